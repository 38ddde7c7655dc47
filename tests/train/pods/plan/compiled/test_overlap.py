"""How much exchange a compiled schedule hides: hand-worked programs on an H100's numbers."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from plait.train.pods.plan.compiled.hlo import Computations
from plait.train.pods.plan.compiled.overlap import schedule
from plait.train.pods.plan.compiled.traffic import Traffic
from plait.train.pods.plan.topology import parse_target

TARGET = parse_target("h100:1x8")
ARRAY = "bf16[65536,1024]"
GATHER = 65536 * 1024 * 2 * 3 / 4 / 450e9  # seconds, over four GPUs of a host
SMALL = 2 * 1024 * 1024 * 4096 / 989e12  # of the product below, longer than its 19 MB of traffic take
LONG = 2 * 8192 * 8192 * 4096 / 989e12
PARAMETERS = (
    "%p = bf16[16384,1024]{1,0} parameter(0)",
    "%a = bf16[1024,4096]{1,0} parameter(1)",
    "%b = bf16[4096,1024]{1,0} parameter(2)",
    "%c = bf16[8192,4096]{1,0} parameter(3)",
    "%d = bf16[4096,8192]{1,0} parameter(4)",
)
GROUPS = "replica_groups=[2,4]<=[8], dimensions={0}"
START = f"%all-gather-start = ((bf16[16384,1024]{{1,0}}), {ARRAY}{{1,0}}) all-gather-start(%p), channel_id=1, {GROUPS}"
DONE = f"%all-gather-done = {ARRAY}{{1,0}} all-gather-done(%all-gather-start)"
CONTRACTED = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
PRODUCT = f"%small = bf16[1024,1024]{{1,0}} dot(%a, %b), {CONTRACTED}"
LONG_PRODUCT = f"%long = bf16[8192,8192]{{1,0}} dot(%c, %d), {CONTRACTED}"


def computation(name: str, *lines: str, entry: bool = False) -> str:
    return "\n".join([f"{'ENTRY ' if entry else ''}%{name} (p: f32[4]) -> f32[4] {{", *(f"  {line}" for line in lines), "}", ""])


def waited(*lines: str, before: str = "") -> dict:
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    text = "HloModule jit_step\n\n" + before + computation("main", *PARAMETERS, *lines, entry=True)
    found = schedule(Traffic(Computations(text, mesh)), mesh, TARGET).waits
    return {key: seconds for key, seconds in found.items() if seconds}


KEY = ("all-gather", ("fsdp",))


def test_products_between_start_and_end_hide_what_they_take():
    assert waited(START, PRODUCT, DONE) == {KEY: pytest.approx(GATHER - SMALL)}
    assert waited(START, LONG_PRODUCT, DONE) == {}
    assert waited(START, DONE, LONG_PRODUCT) == {KEY: pytest.approx(GATHER)}


def test_a_synchronous_collective_hides_nothing():
    gather = f"%all-gather = {ARRAY}{{1,0}} all-gather(%p), channel_id=1, {GROUPS}"
    assert waited(LONG_PRODUCT, gather, PRODUCT) == {KEY: pytest.approx(GATHER)}


def test_two_on_the_same_links_follow_one_another():
    second = [line.replace("all-gather-start", "all-gather-start.2").replace("-done =", "-done.2 =") for line in (START, DONE)]
    second[0] = second[0].replace(" all-gather-start.2(", " all-gather-start(")
    lines = (START, second[0], PRODUCT, second[1], DONE)
    assert waited(*lines) == {KEY: pytest.approx(2 * GATHER - SMALL)}


def test_what_a_loop_waits_counts_for_each_trip():
    body = computation("body", *PARAMETERS, START, PRODUCT, DONE)
    loop = '%w = f32[4] while(%p), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"12"}}'
    assert waited(loop, before=body) == {KEY: pytest.approx(12 * (GATHER - SMALL))}


def test_parts_of_one_collective_in_fusions_are_one_from_the_first_to_the_last():
    """As TPUs compile them: one fusion begins, one does a product meanwhile, one ends."""
    gather = f"%gather = {ARRAY}{{1,0}} all-gather(%p), channel_id=9, {GROUPS}"
    parameter = PARAMETERS[0]
    before = computation("begin", parameter, gather) + computation("end", parameter, gather)
    before += computation("async_collective_fusion", *PARAMETERS, gather, PRODUCT)
    small = "bf16[4]{0}"
    lines = [
        f"%f1 = {small} fusion(%p), kind=kCustom, calls=%begin",
        f"%f2 = {small} fusion(%p, %a, %b, %c, %d), kind=kOutput, calls=%async_collective_fusion",
        f"%f3 = {small} fusion(%p), kind=kCustom, calls=%end",
    ]
    (found,) = waited(*lines, before=before).items()
    assert found[0] == KEY and 0 < found[1] < GATHER - SMALL  # the fusions' own traffic hides some more
