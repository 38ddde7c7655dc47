"""Attention in a ring: outputs, statistics and gradients of one device, in the memory of a part."""

import collections
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import DistanceBias, Mask, Tokens, attention, dispatch, routed_attention
from plait.kernels.attention.call import AttentionCall
from plait.kernels.masks import SelectedBlocks
from plait.tests.kernels import cases
from plait.tests.kernels.test_context import (
    LENGTH,
    MASKS,
    SEGMENTS,
    arrays,
    assert_same,
    compiled,
    compiled_text,
    mesh_of,
    segment_ids,
)
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close
from plait.train.pods.plan.compiled.hlo import instructions

ATTENTION = arrays(q=(2, LENGTH, 4, 8), k=(2, LENGTH, 2, 8), v=(2, LENGTH, 2, 6), sinks=(4,))
EVERY = [(mask, segments, n) for mask in MASKS for segments in SEGMENTS for n in (2, 4)]
KEPT = [("causal", "padded", 4), ("full", "packed", 2), ("window and sinks", "packed", 4), ("two-sided", "mostly padding", 4),
        ("power", "one", 2)]  # fmt: skip


def of(mask: str, segments: str, **options: Any):
    """Outputs of attention, and statistics where they are asked for: of those not the largest logit, whose ties break otherwise."""

    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        found = attention(**inputs, mask=MASKS[mask], at=Tokens(None, segment_ids(SEGMENTS[segments])), **options)
        if options.get("return_lse"):
            return dict(zip(("o", "lse"), found, strict=True))
        if not options.get("return_stats"):
            return {"o": found}
        o, stats = found
        return {"o": o, "lse": stats.lse, "entropy": stats.entropy, "first": stats.first_mass}

    return outputs


@pytest.mark.parametrize(("mask", "segments", "count"), usually(EVERY, *KEPT))
def test_is_attention_of_one_device(mask: str, segments: str, count: int):
    assert_same(of(mask, segments), ATTENTION, mesh_of(context=count), exchange="ring")


@pytest.mark.parametrize(("mask", "segments", "count"), usually(EVERY, *KEPT[:3]))
def test_statistics_and_their_gradients(mask: str, segments: str, count: int):
    assert_same(of(mask, segments, return_stats=True), ATTENTION, mesh_of(context=count), exchange="ring")


def test_the_largest_logit_and_its_gradient():
    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"max": attention(**inputs, mask=Mask(), return_stats=True)[1].max_logit}

    assert_same(outputs, {name: ATTENTION[name] for name in "qkv"}, mesh_of(context=4), exchange="ring")


def test_a_long_key_that_no_query_sees_has_no_part_in_ties():
    """It stands in another document, or later, beside keys that the queries see of that part of the row."""

    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        at = Tokens(None, 1 + (jnp.arange(LENGTH, dtype=jnp.int32)[None] >= 6).repeat(2, 0))
        return {"max": attention(**inputs, mask=Mask(), at=at, return_stats=True)[1].max_logit[:, 6:-1]}

    inputs = {name: ATTENTION[name] for name in "qkv"}
    for long in (3, LENGTH - 1):
        assert_same(outputs, inputs | {"k": inputs["k"].at[:, long].multiply(1e6)}, mesh_of(context=4), exchange="ring")


OPTIONS = ["lse", "sigmoid", "sigmoid with statistics", "soft cap and bias by distance", "sinks of each query", "values in keys",
           "bfloat16", "rows and heads divided too"]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str):
    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        inputs, options = dict(inputs), {}
        if "sigmoid" in name:
            options = {"normalizer": "sigmoid", "return_stats": "statistics" in name}
        if "lse" in name or "each query" in name:
            options = {"return_lse": True}
        if "distance" in name:
            options = {"bias": DistanceBias(inputs.pop("table"), inputs.pop("slopes"), (1, 9)), "logit_soft_cap": 1.5}
        if "values" in name:
            options["value_dim"] = 6
        return of("causal", "packed", **options)(inputs)

    inputs = arrays(q=(2, LENGTH, 4, 8), k=(2, LENGTH, 2, 8), v=(2, LENGTH, 2, 6))
    more = {"sigmoid": {"sigmoid_bias": (4,)}, "soft": {"table": (4, 3), "slopes": (4,)}, "sinks": {"sinks": (2, LENGTH, 4)}}
    inputs |= arrays(**more.get(name.split(maxsplit=1)[0], {}))
    if "values" in name:
        del inputs["v"]
    dtype = jnp.bfloat16 if name == "bfloat16" else None
    inputs = jax.tree.map(lambda x: x.astype(dtype or x.dtype), inputs)
    mesh = mesh_of(data=2, context=2, tensor=2) if "divided" in name else mesh_of(context=4)
    assert_same(outputs, inputs, mesh, dtype, exchange="ring")


@pytest.mark.parametrize("name", ["routed", "chosen"])
def test_what_cannot_go_round_is_gathered(name: str, caplog: pytest.LogCaptureFixture):
    rng, at = np.random.default_rng(3), Tokens(None, segment_ids(SEGMENTS["packed"]))
    active = jnp.asarray(rng.random((2, LENGTH, 4)) < 0.6)
    blocks = SelectedBlocks(indices=jnp.asarray(rng.integers(0, 8, (2, LENGTH, 4, 3)), jnp.int32), block_size=4, num_blocks=16)

    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if name == "routed":
            return {"o": routed_attention(**inputs, active=active, mask=Mask(), at=at)}
        return dict(zip(("o", "lse"), attention(**inputs, mask=Mask(), at=at, selected=blocks, return_lse=True), strict=True))

    assert_same(outputs, {name: ATTENTION[name] for name in "qkv"}, mesh_of(context=2), exchange="ring")
    reasons = {"routed": "routed heads tell no log-normaliser", "chosen": "chosen keys are of the whole row"}
    assert f"all keys are gathered: {reasons[name]}" in caplog.text


def gradient(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Of causal attention."""
    return jax.grad(lambda inputs: jnp.square(attention(**inputs, mask=Mask())).sum())(inputs)


def sent(function: Any, inputs: dict[str, Any], count: int) -> collections.Counter[tuple[str, tuple[int, ...]]]:
    """How often a device sends floats of a shape in the compiled program, by kind of collective; segments and positions left out."""
    found: collections.Counter[tuple[str, tuple[int, ...]]] = collections.Counter()
    for one in instructions(compiled_text(function, inputs, count, "ring"), mesh_of(context=count)):
        for dtype, shape in one.shapes:
            found[one.kind, shape] += one.times * (dtype == "f32")
    return +found


def test_parts_go_round_and_nothing_is_gathered():
    """Keys and values take a hop less than there are parts, forward and backward; their gradients as many, and are home then."""
    inputs = {name: jax.ShapeDtypeStruct((1, 128, 2, size), np.float32) for name, size in (("q", 5), ("k", 5), ("v", 7))}
    found = sent(gradient, inputs, 4)
    halves = {key: found.pop(key) for key in list(found) if key[1][1] == 16}
    assert found == {("collective-permute", (1, 32, 2, size)): 3 + 3 + 4 for size in (5, 7)}
    assert halves == {("collective-permute", (1, 16, 2, size)): 4 for size in (5, 7)}, "q, k and v, o, to the other end and back"


def assert_shares_add_up(inputs: dict[str, jax.Array], implementation: str, dtype: Any = None) -> None:
    """`AttentionCall.whole`: the gradients of the keys of either half, given the outputs and the log-normalisers of all."""
    at = Tokens(None, jnp.repeat(jnp.asarray([[1, 2]], jnp.int32), inputs["q"].shape[1] // 2, axis=1)).placed(
        *inputs["q"].shape[:2]
    )
    call = AttentionCall.of("attention", **inputs, mask=Mask(), at=at, kv_at=at)
    run = dispatch._ops["attention"]

    def of_all(inputs: dict[str, jax.Array]) -> Any:
        o, stats = run("reference", call.replace(**inputs, return_stats=True))
        return o, stats.lse

    @cases.quick_jit
    def both(inputs: dict[str, jax.Array]) -> Any:
        whole, back = jax.vjp(of_all, inputs)
        rng = np.random.default_rng(9)
        cotangents = tuple(jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in whole)

        def share(side: int) -> dict[str, jax.Array]:
            cut = lambda x: jnp.split(x, 2, axis=1)[side]

            def of_some(inputs: dict[str, jax.Array]) -> Any:
                some = call.replace(q=inputs["q"], k=cut(inputs["k"]), v=cut(inputs["v"]), kv_at=jax.tree.map(cut, at))
                o, stats = run(implementation, some.replace(whole=whole, return_lse=True))
                return o.astype(jnp.float32), stats.lse

            return jax.vjp(of_some, inputs)[1]((cotangents[0].astype(jnp.float32), cotangents[1]))[0]

        return jax.tree.map(jnp.add, share(0), share(1)), back(cotangents)[0]

    found, wanted = both(inputs)
    for name in inputs:
        assert_close(found[name], wanted[name], dtype=dtype, err_msg=name)


def test_memory_is_that_of_a_part():
    """Of the compiled gradient: as much on 8 devices as on 4 where their parts are as long; gathered keys double it."""
    sizes = {}
    for count, exchange in ((4, "ring"), (8, "ring"), (8, "gather")):
        inputs = {name: jax.ShapeDtypeStruct((1, 1024 * count, 2, 32), np.float32) for name in "qkv"}
        stats: Any = compiled(gradient, inputs, count, exchange).memory_analysis()
        sizes[count, exchange] = stats.temp_size_in_bytes
    assert sizes[8, "ring"] == pytest.approx(sizes[4, "ring"], rel=0.01)
    assert sizes[8, "gather"] > 3 * sizes[8, "ring"]


def test_a_window_within_reach_asks_its_neighbours():
    inputs = {name: ATTENTION[name] for name in "qkv"}
    texts = [compiled_text(of("window", "packed"), inputs, 4, exchange) for exchange in ("ring", "gather")]
    ring, gather = (re.findall(r"= (\S+) (all-\w+|collective-\w+)\(", text) for text in texts)
    assert ring == gather and any(kind == "collective-permute" for _, kind in ring)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("length", [64, 1024])
def test_shares_of_a_known_whole(implementation: str, length: int):
    """What two sets of keys have of the gradients adds up to them: of one tile, and of several."""
    inputs = arrays(q=(1, length, 4, 8), k=(1, length, 2, 8), v=(1, length, 2, 6))
    assert_shares_add_up(inputs, implementation)


RECURRENCES = [(name, segments, n) for name in cases.RECURRENCES for segments in SEGMENTS for n in (2, 4)]
KEPT_RECURRENCES = [
    ("scalar_decay", "packed", 2),
    ("vector_decay", "padded", 4),
    ("gated_deltanet", "mostly padding", 4),
    ("dplr", "one", 4),
]


@pytest.mark.parametrize(("name", "segments", "count"), usually(RECURRENCES, *KEPT_RECURRENCES))
def test_states_are_handed_on(name: str, segments: str, count: int):
    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        named = {key: x for key, x in inputs.items() if key != "state"}
        at = Tokens(None, segment_ids(SEGMENTS[segments]))
        o, final = cases.RECURRENCES[name].call(named, initial_state=inputs["state"], at=at, chunk_size=8)
        return {"o": o, "state": final}

    inputs = cases.RECURRENCES[name].inputs(LENGTH, decay="weak" if segments == "packed" else "mixed") | {"state": cases.state()}
    assert_same(outputs, inputs, mesh_of(context=count), exchange="ring")


@pytest.mark.parametrize("name", ["vector_decay", "gated_deltanet"])
def test_a_state_takes_a_hop_less_than_there_are_parts(name: str):
    """Forward and backward; neither decays nor maps are sent."""
    inputs = cases.RECURRENCES[name].inputs(LENGTH, decay="weak")

    def gradient(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return jax.grad(lambda x: cases.RECURRENCES[name].call(x, chunk_size=8)[0].sum())(inputs)

    assert sent(gradient, inputs, 4) == {("collective-permute", cases.state().shape): 2 * 3}
