"""How long operations take: hand-worked lines of compiled programs."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from plait.tests.train.pods.plan.compiled.test_overlap import computation
from plait.train.pods.plan.compiled import durations
from plait.train.pods.plan.compiled.hlo import Computations
from plait.train.pods.plan.compiled.overlap import schedule
from plait.train.pods.plan.compiled.traffic import Traffic
from plait.train.pods.plan.topology import parse_target

CLOCK, FLOPS, BANDWIDTH = 1.5e9, 197e12, 819e9  # of v5e
PARAMETERS = (
    "%q = bf16[2,8,4096,128]{3,2,1,0} parameter(0)",
    "%list = s32[10]{0} parameter(1)",
    "%a = bf16[4096,4096]{1,0} parameter(2)",
)
COST = '"custom_call_config":{"cost_estimate":{"flops":"1970000000","transcendentals":"7","bytes_accessed":"9"}}'
FUSION = '%f = f32[4]{0} fusion(%a), kind=kLoop, calls=%body, backend_config={"window_config":{"estimated_cycles":"3000"}}'
PRODUCT = "%dot = bf16[4096,4096]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
COPY = "%copy-start = (bf16[4096,4096]{1,0:S(1)}, bf16[4096,4096]{1,0}, u32[]{:S(2)}) copy-start(%a)"
SHARES = {
    "v5e": {
        "attention_forward": {64: 0.25, 128: 0.5},
        "attention": {64: 1.0},
        "short_conv_forward": {0: 0.01},
        "decay": {256: 0.5},
    }
}


def kernel(name: str, operands: str) -> str:
    return f'%{name} = f32[4]{{0}} custom-call({operands}), custom_call_target="tpu_custom_call", backend_config={{{COST}}}'


@pytest.fixture(autouse=True)
def known_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durations, "SHARES", SHARES)


def work(*lines: str, target: str = "v5e:2x2", before: str = "") -> dict[str, float]:
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",), axis_types=(AxisType.Auto,))
    text = "HloModule jit_step\n\n" + before + computation("main", *PARAMETERS, *lines, entry=True)
    found = schedule(Traffic(Computations(text, mesh)), mesh, parse_target(target))
    assert found.seconds == pytest.approx(sum(found.work.values())) == pytest.approx(sum(found.by_layer().values()))
    return found.by_source()


def test_a_fusion_takes_the_compilers_cycles():
    assert work(FUSION) == {"compiler": pytest.approx(3000 / CLOCK)}


def test_what_has_no_estimate_is_at_the_peak():
    assert work(PRODUCT) == {"peak": pytest.approx(2 * 4096**3 / FLOPS)}
    assert work(PRODUCT, target="h100:1x4") == {"peak": pytest.approx(max(2 * 4096**3 / 989e12, 3 * 4096**2 * 2 / 3350e9))}


@pytest.mark.parametrize(
    ("name", "operands", "share"),
    [
        ("transpose_jvp_attention_forward__.3", "%list, %q", 0.5),  # the longest name that fits, at its width
        ("attention_mass.1", "%list, %q", 1.0),  # narrower widths only
        ("jvp_short_conv_forward_.1", "%a", 0.01),  # without heads
        ("decay.1", "%list, %q", 0.25),  # wider ones only, whose lanes it fills by half
    ],
)
def test_a_kernel_takes_its_operations_at_its_share_of_the_peak(name: str, operands: str, share: float):
    assert work(kernel(name, operands)) == {"kernels": pytest.approx(1.97e9 / FLOPS / share)}


def test_an_unknown_kernel_is_at_the_peak_of_what_it_says_or_moves():
    assert work(kernel("new_kernel.1", "%list")) == {"peak": pytest.approx(1.97e9 / FLOPS)}
    assert work(kernel("new_kernel.1", "%q, %a")) == {
        "peak": pytest.approx((2 * 8 * 4096 * 128 * 2 + 4096**2 * 2 + 16) / BANDWIDTH)
    }


def test_a_kernel_for_gpus_says_its_operations_too():
    cost = r'cost_estimate_json = "{\22flops\22: 98900000000, \22transcendentals\22: 7, \22bytes_accessed\22: 9}"'
    line = f'%mpmd_map.1 = f32[4]{{0}} custom-call(%list), custom_call_target="mosaic_gpu_v2", backend_config={{{cost}}}'
    assert work(line, target="h100:1x4") == {"peak": pytest.approx(98.9e9 / 989e12)}


def test_copies_that_are_started_ahead_run_beside_the_rest():
    assert work(COPY, FUSION) == work(FUSION)


def test_a_loop_counts_each_trip():
    body = computation("loop", *PARAMETERS, FUSION)
    loop = '%w = f32[4] while(%q), condition=%cond, body=%loop, backend_config={"known_trip_count":{"n":"12"}}'
    assert work(loop, before=body) == {"compiler": pytest.approx(12 * 3000 / CLOCK)}


def test_time_is_told_apart_by_layer():
    lines = [
        line + f', metadata={{op_name="{op}"}}'
        for line, op in ((FUSION, "jit(step)/layer_softmax/mul"), (PRODUCT, "jit(step)/head"))
    ]
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",), axis_types=(AxisType.Auto,))
    text = "HloModule jit_step\n\n" + computation("main", *PARAMETERS, *lines, COPY.replace("copy-start", "copy"), entry=True)
    found = schedule(Traffic(Computations(text, mesh)), mesh, parse_target("v5e:2x2"))
    assert set(found.work) == {("softmax", "compiler"), ("others", "peak"), ("unnamed", "peak")}
    assert next(iter(found.by_layer())) == "others"
