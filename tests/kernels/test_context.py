"""Sequences cut over devices: outputs, states, statistics and gradients of every op are those of one device."""

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from plait.kernels import DistanceBias, LowRankBias, Mask, Tokens, attention, routed_attention, short_conv
from plait.kernels.attention.call import AttentionCall
from plait.kernels.attention.visits import laid_out, segment_starts
from plait.kernels.context import Exchange
from plait.kernels.context.attention import among
from plait.kernels.masks import ChunkMask, PowerMask, SelectedBlocks
from plait.kernels.sharding import splitting
from plait.tests.kernels import cases
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close

LENGTH = 64
# Lengths of the segments of two rows: across every border of 2, 4 and 8 parts, with some parts of one segment and one of many.
SEGMENTS = {
    "one": None,
    "packed": [[5, 20, 3, 36], [30, 1, 1, 1, 31]],
    "padded": [[-3, 21, -9, 17, -14], [64]],
    "mostly padding": [[6, -58], [-40, 24]],
}


def segment_ids(lengths: list[list[int]] | None) -> jax.Array | None:
    """Ids from 1 up in each row; a negative length is padding."""
    if lengths is None:
        return None
    rows = []
    for row in lengths:
        ids = [(i + 1 if n > 0 else 0, abs(n)) for i, n in enumerate(row)]
        rows.append(np.concatenate([np.full(n, i) for i, n in ids]))
    return jnp.asarray(np.stack(rows), jnp.int32)


def arrays(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def mesh_of(**sizes: int) -> Mesh:
    names = ("data", "context", "tensor")
    shape = [sizes.get(name, 1) for name in names]
    return Mesh(np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape), names, axis_types=(AxisType.Auto,) * 3)


def assert_same(
    function: Any, inputs: dict[str, jax.Array], mesh: Mesh, dtype: Any = None, exchange: Exchange = "gather"
) -> None:
    """`function(inputs)`, a dict of outputs, and its gradients, on one device and cut over the mesh."""
    function = partial(cases.with_gradients, function)
    alone = cases.quick_jit(function)(inputs)

    def placed(x: jax.Array) -> jax.Array:
        cut = x.ndim > 1 and x.shape[1] == LENGTH
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "context") if cut else PartitionSpec()))

    with splitting(mesh, batch=("data",), heads=("tensor",), context=("context",), exchange=exchange):
        found = cases.quick_jit(partial(function))(jax.tree.map(placed, inputs))
    for (path, got), want in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(alone), strict=True):
        assert_close(got, want, dtype=dtype, err_msg=jax.tree_util.keystr(path))


CUTS = [("packed", 2), ("padded", 8)]
EVERY = [(segments, n) for segments in SEGMENTS for n in (2, 4, 8)]


def cuts(names: Iterable[str], *thorough: str) -> list[Any]:
    """Each of the names with each row and number of parts: by default all with the most parts, the `thorough` ones with two too."""
    kept = [(name, *cut) for name in names for cut in CUTS[:: 1 if name in thorough else -2]]
    return usually([(name, *cut) for name in names for cut in EVERY], *kept)


@pytest.mark.parametrize(("name", "segments", "count"), cuts(cases.RECURRENCES, "vector_decay", "gated_deltanet"))
def test_recurrence(name: str, segments: str, count: int):
    ids = segment_ids(SEGMENTS[segments])

    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        named = {key: x for key, x in inputs.items() if key != "state"}
        o, final = cases.RECURRENCES[name].call(named, initial_state=inputs["state"], at=Tokens(None, ids), chunk_size=8)
        return {"o": o, "state": final}

    inputs = cases.RECURRENCES[name].inputs(LENGTH, decay="weak" if segments == "packed" else "mixed") | {"state": cases.state()}
    assert_same(outputs, inputs, mesh_of(context=count))


@pytest.mark.parametrize("largest", usually([2**24 + 1, 2**31 - 1], 2**24 + 1))
@pytest.mark.parametrize("name", ["vector_decay", "deltanet"])
def test_recurrence_tells_large_ids_apart(name: str, largest: int):
    """Neighbouring ids that are one number in float32 begin a new segment at the border of two parts."""
    ids = jnp.asarray(np.repeat([[largest - 1, largest]] * cases.BATCH, LENGTH // 2, axis=1), jnp.int32)
    inputs = cases.RECURRENCES[name].inputs(LENGTH, decay="weak")
    assert_same(
        lambda inputs: cases.RECURRENCES[name].call(inputs, at=Tokens(None, ids), chunk_size=8)[1], inputs, mesh_of(context=2)
    )


@pytest.mark.parametrize("name", usually(cases.RECURRENCES, "scalar_decay", "kda"))
def test_recurrence_in_bfloat16(name: str):
    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        o, final = cases.RECURRENCES[name].call(inputs, at=Tokens(None, segment_ids(SEGMENTS["packed"])), chunk_size=8)
        return {"o": o, "state": final}

    assert_same(
        outputs, cases.RECURRENCES[name].inputs(LENGTH, decay="weak", dtype=jnp.bfloat16), mesh_of(context=4), jnp.bfloat16
    )


@pytest.mark.parametrize("name", usually(cases.RECURRENCES, "vector_decay", "kda", "dplr"))
def test_recurrence_statistics(name: str):
    """Parts of whole spans, so that these are the same spans; two rows of 512 tokens."""
    inputs = cases.RECURRENCES[name].inputs(512, decay="weak")
    ids = jnp.repeat(segment_ids(SEGMENTS["packed"]), 8, axis=1)

    def outputs(inputs: dict[str, jax.Array]) -> Any:
        return cases.RECURRENCES[name].call(inputs, at=Tokens(None, ids), return_stats=True)[1:]

    alone = cases.quick_jit(outputs)(inputs)
    with splitting(mesh_of(context=4), batch=("data",), heads=("tensor",), context=("context",)):
        found = cases.quick_jit(partial(outputs))(inputs)
    jax.tree.map(assert_close, found, alone)


@pytest.mark.parametrize(("segments", "count"), usually(EVERY, *CUTS))
def test_short_conv(segments: str, count: int):
    def outputs(inputs: dict[str, jax.Array]) -> Any:
        return short_conv(**inputs, at=Tokens(None, segment_ids(SEGMENTS[segments])))

    assert_same(outputs, arrays(x=(2, LENGTH, 6), weight=(4, 6), initial_state=(2, 3, 6)), mesh_of(context=count))


MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window": Mask(window_size=5),
    "window of several parts": Mask(window_size=21),
    "window and sinks": Mask(window_size=7, num_sink_tokens=2),
    "dilated": Mask(window_size=4, dilation=2),
    "two-sided": Mask(causal=False, window_size=6, right_window_size=3),
    "power": PowerMask(block_size=4, window_size=8),
    "chunk": ChunkMask(chunk_size=6, shift=2, kv_shift=4),
}


@pytest.mark.parametrize(("mask", "segments", "count"), cuts(MASKS, "causal", "window of several parts"))
def test_attention(mask: str, segments: str, count: int):
    """With sink logits and statistics, from whose gradients the largest logit is left out: ties break otherwise."""

    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        ids = segment_ids(SEGMENTS[segments])
        o, stats = attention(**inputs, mask=MASKS[mask], at=Tokens(None, ids), return_stats=True)
        return {"o": o, "lse": stats.lse, "entropy": stats.entropy, "first": stats.first_mass}

    inputs = arrays(q=(2, LENGTH, 4, 8), k=(2, LENGTH, 2, 8), v=(2, LENGTH, 2, 6), sinks=(4,))
    assert_same(outputs, inputs, mesh_of(context=count))


BY_HEADS = [("packed", 2, "window and sinks"), ("padded", 4, "causal"), ("mostly padding", 4, "power"), ("one", 2, "full")]


@pytest.mark.parametrize(("segments", "count", "mask"), BY_HEADS)
def test_attention_by_heads(segments: str, count: int, mask: str):
    """With two key heads, of which two of four devices need the same one; whatever a head has of its own goes with it."""

    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        inputs = dict(inputs)
        bias = DistanceBias(inputs.pop("table"), inputs.pop("slopes"), (1, 9)) if count == 4 else None
        at = Tokens(None, segment_ids(SEGMENTS[segments]))
        o, stats = attention(**inputs, mask=MASKS[mask], bias=bias, at=at, return_stats=True)
        return {"o": o, "lse": stats.lse, "entropy": stats.entropy, "first": stats.first_mass}

    inputs = arrays(q=(2, LENGTH, 4, 8), k=(2, LENGTH, 2, 8), v=(2, LENGTH, 2, 6))
    inputs |= arrays(sinks=(2, LENGTH, 4), table=(4, 3), slopes=(4,)) if count == 4 else arrays(sinks=(4,))
    assert_same(outputs, inputs, mesh_of(context=count), exchange="all_to_all")
    text = compiled_text(outputs, inputs, count, "all_to_all")
    assert "all-to-all" in text and not re.search(rf"\[2,{LENGTH},[24],[68]\]\S* all-gather\(", text), "no device has all keys"


@pytest.mark.parametrize("name", ["sigmoid", "chosen by all", "chosen by each", "routed", "heads that cannot be dealt out"])
def test_other_attention_by_heads(name: str, caplog: pytest.LogCaptureFixture):
    at = Tokens(None, segment_ids(SEGMENTS["packed"]))
    active = jnp.asarray(np.random.default_rng(3).random((2, LENGTH, 4)) < 0.6)
    choosing = 1 if name == "chosen by all" else 4
    blocks = jnp.asarray(np.random.default_rng(4).integers(0, 8, (2, LENGTH, choosing, 3)), jnp.int32)

    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if name == "routed":
            return {"o": routed_attention(**inputs, active=active, mask=Mask(), at=at)}
        options: dict[str, Any] = {"normalizer": "sigmoid", "sigmoid_bias": jnp.arange(4.0)} if name == "sigmoid" else {}
        if "chosen" in name:
            options |= {"selected": SelectedBlocks(indices=blocks, block_size=4, num_blocks=16), "return_lse": True}
            return dict(zip(("o", "lse"), attention(**inputs, mask=Mask(), at=at, **options), strict=True))
        return {"o": attention(**inputs, mask=Mask(), at=at, **options)}

    heads = 3 if "cannot" in name else 4
    inputs = arrays(q=(2, LENGTH, heads, 8), k=(2, LENGTH, heads, 8), v=(2, LENGTH, heads, 6))
    assert_same(outputs, inputs, mesh_of(context=2, tensor=1 if heads == 3 else 2), exchange="all_to_all")
    assert ("all-to-all" in compiled_text(outputs, inputs, 2, "all_to_all")) == (heads == 4)
    assert ("3 heads with 3 key heads cannot be dealt out to 2 devices" in caplog.text) == (heads == 3)


@pytest.mark.parametrize("chosen", [False, True])
def test_queries_that_choose_stay_where_they_are(chosen: bool):
    """Their work is as much wherever they stand; others are swapped between the two ends."""
    blocks = jnp.asarray(np.random.default_rng(4).integers(0, 8, (2, LENGTH, 1, 3)), jnp.int32)
    selected = SelectedBlocks(indices=blocks, block_size=4, num_blocks=16) if chosen else None

    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return dict(zip(("o", "lse"), attention(**inputs, mask=Mask(), selected=selected, return_lse=True), strict=True))

    inputs = arrays(q=(2, LENGTH, 4, 8), k=(2, LENGTH, 2, 8), v=(2, LENGTH, 2, 6))
    assert_same(outputs, inputs, mesh_of(context=4))
    assert ("collective-permute" in compiled_text(outputs, inputs, 4)) != chosen


@pytest.mark.parametrize(("segments", "count"), CUTS)
def test_attention_to_other_keys(segments: str, count: int):
    """Such as compressed ones: every device has all of them, and answers its own queries only."""
    tokens = Tokens(None, segment_ids(SEGMENTS[segments])).placed(2, LENGTH)
    kv_at = Tokens(None, tokens.segment_ids[:, 3::4], tokens.positions[:, 3::4])

    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"o": attention(**inputs, mask=Mask(), at=tokens, kv_at=kv_at)}

    inputs = arrays(q=(2, LENGTH, 6, 8), k=(2, LENGTH // 4, 2, 8), v=(2, LENGTH // 4, 2, 6))
    assert_same(outputs, inputs, mesh_of(context=count))
    products = [line for line in compiled_text(outputs, inputs, count).splitlines() if " dot(" in line]
    of_all = (f"[2,{LENGTH},", f",{LENGTH},", f",{3 * LENGTH},")  # three heads share keys, and are rows of one product
    assert products and not any(size in line for line in products for size in of_all), "no device has all queries"


def test_sigmoid_attention():
    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"o": attention(**inputs, mask=Mask(), normalizer="sigmoid", at=Tokens(None, segment_ids(SEGMENTS["packed"])))}

    inputs = arrays(q=(2, LENGTH, 4, 8), k=(2, LENGTH, 2, 8), v=(2, LENGTH, 2, 6), sigmoid_bias=(4,))
    assert_same(outputs, inputs, mesh_of(context=4))


@pytest.mark.parametrize("mask", ["causal", "window"])
def test_attention_with_soft_cap_and_bias(mask: str):
    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        inputs = dict(inputs)
        bias = LowRankBias(inputs.pop("left"), inputs.pop("right"))
        at = Tokens(None, segment_ids(SEGMENTS["packed"]))
        return {"o": attention(**inputs, mask=MASKS[mask], logit_soft_cap=1.5, bias=bias, at=at)}

    shapes = {"q": (2, LENGTH, 4, 8), "k": (2, LENGTH, 2, 8), "v": (2, LENGTH, 2, 6)}
    assert_same(outputs, arrays(**shapes, left=(2, LENGTH, 4, 2), right=(1, LENGTH, 1, 2)), mesh_of(context=4))


@pytest.mark.parametrize("mask", ["causal", "window"])
def test_attention_with_bias_by_distance_and_sinks_of_each_query(mask: str):
    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        inputs = dict(inputs)
        bias = DistanceBias(inputs.pop("table"), inputs.pop("slopes"), (1, 9))
        return {"o": attention(**inputs, mask=MASKS[mask], bias=bias, at=Tokens(None, segment_ids(SEGMENTS["packed"])))}

    shapes = {"q": (2, LENGTH, 4, 8), "k": (2, LENGTH, 2, 8), "v": (2, LENGTH, 2, 6), "sinks": (2, LENGTH, 4)}
    assert_same(outputs, arrays(**shapes, table=(4, 3), slopes=(4,)), mesh_of(context=4, tensor=2))


@pytest.mark.parametrize("mask", ["causal", "window"])
def test_routed_attention(mask: str):
    active = jnp.asarray(np.random.default_rng(3).random((2, LENGTH, 4)) < 0.6)

    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        ids = segment_ids(SEGMENTS["packed"])
        return {"o": routed_attention(**inputs, active=active, mask=MASKS[mask], at=Tokens(None, ids))}

    assert_same(outputs, arrays(q=(2, LENGTH, 4, 8), k=(2, LENGTH, 2, 8), v=(2, LENGTH, 2, 6), sinks=(4,)), mesh_of(context=4))


@pytest.mark.parametrize("name", ["attention", "gated_deltanet", "short_conv"])
def test_beside_split_rows_and_heads(name: str):
    ids = segment_ids(SEGMENTS["packed"])

    def outputs(inputs: dict[str, jax.Array]) -> Any:
        if name == "attention":
            return attention(**inputs, mask=Mask(), at=Tokens(None, ids))
        if name == "short_conv":
            return short_conv(**inputs, at=Tokens(None, ids))[0]
        return cases.RECURRENCES[name].call(inputs, at=Tokens(None, ids), chunk_size=8)[0]

    shapes = {
        "attention": arrays(q=(2, LENGTH, 4, 8), k=(2, LENGTH, 2, 8), v=(2, LENGTH, 2, 6)),
        "short_conv": arrays(x=(2, LENGTH, 6), weight=(4, 6)),
    }
    inputs = shapes.get(name) or cases.RECURRENCES[name].inputs(LENGTH, decay="weak")
    assert_same(outputs, inputs, mesh_of(data=2, context=2, tensor=2))


def compiled_text(function: Any, inputs: dict[str, jax.Array], count: int, exchange: Exchange = "gather") -> str:
    return compiled(function, inputs, count, exchange).as_text() or ""


def compiled(function: Any, inputs: dict[str, Any], count: int, exchange: Exchange = "gather") -> jax.stages.Compiled:
    mesh = mesh_of(context=count)
    where = lambda x: NamedSharding(
        mesh, PartitionSpec(None, "context") if x.ndim > 1 and x.shape[1] % count == 0 else PartitionSpec()
    )
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x)) for name, x in inputs.items()}
    with splitting(mesh, batch=("data",), heads=("tensor",), context=("context",), exchange=exchange):
        return jax.jit(partial(function)).lower(shapes).compile()


@pytest.mark.parametrize(("name", "segments", "count"), cuts(cases.RECURRENCES, "vector_decay", "gated_deltanet"))
def test_implied_attention(name: str, segments: str, count: int):
    inputs = {key: x for key, x in cases.RECURRENCES[name].inputs(LENGTH, decay="weak").items() if key != "v"}

    def outputs(inputs: dict[str, jax.Array]) -> jax.Array:
        rows = jnp.asarray([0, 5, 31, 32, 40, 63])
        return cases.RECURRENCES[name].implied(inputs, rows, at=Tokens(None, segment_ids(SEGMENTS[segments])), chunk_size=8)

    alone = cases.quick_jit(outputs)(inputs)
    with splitting(mesh_of(context=count), batch=("data",), heads=("tensor",), context=("context",)):
        found = cases.quick_jit(partial(outputs))(inputs)
    assert_close(found, alone)


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("reach", [0, 5])
def test_parts_know_where_the_segments_of_their_queries_begin(segments, reach):
    """As found by looking for each query's segment among all keys, of a whole row or of those within reach."""
    at = Tokens(segment_ids=segment_ids(SEGMENTS[segments])).placed(2, LENGTH)
    parts, indices = 4, jnp.zeros((2, LENGTH // 4, 1, 1), jnp.int32)
    cut = lambda x, start, stop: jnp.pad(x, ((0, 0), (reach, 0)))[:, start : stop + reach]
    q = jnp.ones((2, LENGTH // parts, 1, 8))
    for part in range(parts):
        start, stop = part * LENGTH // parts, (part + 1) * LENGTH // parts
        own = jax.tree.map(lambda x, start=start, stop=stop: x[:, start:stop], at)
        keys = jax.tree.map(lambda x, start=start, stop=stop: cut(x, start, stop), at) if reach else at
        k = jnp.ones((2, keys.positions.shape[1], 1, 8))
        selected = SelectedBlocks(indices=indices, block_size=4, num_blocks=16)
        call = AttentionCall(q=q, k=q, v=q, at=own, selected=selected, mask=Mask(), scale=1.0)
        call = among(reach or start, call, k=k, v=k, kv_at=keys)
        layout, *sides = laid_out(call)
        sides = [jax.tree.map(lambda x: x[:, None], side) for side in sides]
        real = np.asarray(own.segment_ids) > 0
        found = segment_starts(layout, *sides, selected)
        np.testing.assert_array_equal(np.where(real, call.selected.starts, 0), np.where(real, found, 0))
        assert segment_starts(layout, *sides, call.selected) is call.selected.starts
