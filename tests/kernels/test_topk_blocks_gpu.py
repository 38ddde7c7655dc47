"""The GPU kernels of block selection in Pallas' GPU interpreter, with race detection, and through ptxas, against the reference."""

import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from plait.kernels import Tokens, gpu, topk_blocks, whole_blocks
from plait.kernels.target import target
from plait.kernels.topk_blocks import largest_gpu, pallas_gpu, reference, scores_gpu, tiles
from plait.tests.kernels import cases
from plait.tests.kernels.choices import Case, call_of
from plait.tests.kernels.gpu_targets import TARGETS
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close, in_float64

needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < gpu.MIN_JAX, reason=f"the GPU interpreter needs JAX >= {'.'.join(map(str, gpu.MIN_JAX))}"
)
needs_compiler = pytest.mark.skipif(
    jax.__version_info__ < gpu.MIN_JAX or not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)),
    reason="compiling for GPUs needs JAX's CUDA plugin",
)

SCORES = {
    "softmax": Case(length=140),
    "runs": Case(heads=(3, 1), runs=(2, 4), length=380, segments="long", dtype="bfloat16"),
    "mixed": Case(runs=(4, 4), segments="left", dtype="bfloat16", length=130),
    "sums": Case(scale=None, length=130),
    "sums-bfloat16": Case(scale=None, length=130, dim=200, dtype="bfloat16"),
    "indexer": Case(heads=(5, 1), scale=None, weights=True, length=140),
    "two-chunks": Case(heads=(2, 2), runs=(2, 8), segments=None, length=700, dim=8, dtype="bfloat16"),
}


@needs_interpreter
@pytest.mark.parametrize("name", usually(SCORES, "softmax", "runs", "indexer", newest=("softmax", "runs", "indexer")))
def test_scores_match_reference(name: str):
    call, arrays = call_of(SCORES[name])
    if name == "mixed":
        arrays["blocks"] = arrays["blocks"].astype(jnp.float32)
    with gpu.interpreting(), target("h100"):
        got = jax.block_until_ready(cases.quick_jit(lambda arrays: scores_gpu.scores(call(arrays)))(arrays))
    plain = cases.quick_jit(lambda arrays: reference.scores(call(arrays)))
    assert_close(got, in_float64(plain, arrays), plain=plain(arrays), dtype=SCORES[name].dtype)
    assert np.asarray(got).any()


CHOICES = {
    "runs": Case(runs=(4, 8), length=60),
    "first-and-local": Case(heads=(2, 1), length=70, segments="long"),
    "tokens": Case(heads=(4, 1), scale=None, weights=True, length=45),
    "tokens-two-groups": Case(heads=(4, 2), scale=None, weights=True, length=40, segments="left", dtype="bfloat16"),
    "tokens-in-order": Case(heads=(2, 1), scale=None, weights=True, length=300, segments=None, dim=8),
}


@needs_interpreter
@pytest.mark.parametrize("name", usually(CHOICES, "first-and-local", "tokens", newest=("first-and-local", "tokens")))
def test_selection_is_that_of_the_reference(name: str):
    """Whole numbers, so that there are many ties and, without a softmax, no sum is rounded; in the order of the tokens."""
    call, arrays = call_of(CHOICES[name])
    arrays = {key: jnp.round(x) for key, x in arrays.items()}
    options: dict[str, Any] = {"top_k": 12} if CHOICES[name].weights else {}
    options |= {"num_local": 2, "num_first": 1, "scale": None} if name == "first-and-local" else {}
    choose = lambda arrays: call(arrays).replace(**options)
    with gpu.interpreting(), target("h100"):
        assert pallas_gpu.unsupported(choose(arrays)) is None
        found = np.asarray(cases.quick_jit(lambda arrays: pallas_gpu.topk_blocks(choose(arrays)))(arrays))
    expected = np.asarray(reference.topk_blocks(choose(arrays)))
    assert (np.sort(found, axis=-1) == np.sort(expected, axis=-1)).all() and (expected >= 0).any()
    if CHOICES[name].weights:
        there = (found >= 0).sum(-1, keepdims=True)
        assert (np.diff(found, axis=-1)[np.arange(found.shape[-1] - 1) < there - 1] > 0).all()


@pytest.mark.parametrize("layout", ["one", "several", "left", "inside"])
@pytest.mark.parametrize("runs", [(4, 8), (2, 8), (4, 4)], ids=str)
def test_scores_of_blocks_are_those_of_the_reference(runs: tuple[int, int], layout: str):
    """By the places of runs where none is missing in a segment, as it is inside padding."""
    case = Case(runs=runs, length=90, heads=(4, 2), segments="one" if layout == "inside" else layout)
    call, arrays = call_of(case)
    ids = cases.segments(case.length, case.segments or "one")
    if layout == "inside":
        ids = ids.at[0, 33:52].set(0)
    at = Tokens(None, ids).placed(*ids.shape)
    call = call(arrays).replace(at=at, blocks_at=whole_blocks(at, *runs).at)
    scores = reference.scores(call)
    expected = np.asarray(reference.blocks_of(call, scores))
    by_place = np.asarray(pallas_gpu.by_place(call, scores))
    assert (np.asarray(pallas_gpu.blocks_of(call, scores)) == expected).all() and expected.any()
    assert (by_place == expected).all() == (layout != "inside")


@pytest.mark.parametrize("layout", ["one", "several", "left", "long"])
def test_chunks_are_reached_where_something_is_scored(layout: str):
    """And whole where all of a tile's queries have scores for all."""
    queries, chunk = 8, 4
    call, arrays = call_of(Case(runs=(2, 4), length=96, segments=layout))
    call = call(arrays)
    limits, whole = (np.asarray(x) for x in tiles.reached(tiles.query_rows(call), tiles.scored_rows(call), queries, chunk))
    scored = np.asarray(reference.scored(call)).reshape(cases.BATCH, 96 // queries, queries, 48 // chunk, chunk)
    assert ((whole == 1) == scored.all(axis=(2, 4))).all()
    assert whole.any() or layout == "several"
    place = np.arange(48 // chunk)
    within = (place >= limits[..., :1]) & (place < limits[..., 1:])
    assert within[scored.any(axis=(2, 4))].all() and not within.all()


def _rows(length: int) -> np.ndarray:
    """Rows of numbers: any with some that are none, few different ones, all the same, next to none, the least and the largest, none, any."""
    rng, never = np.random.default_rng(length), largest_gpu.NEVER
    rows = rng.integers(never, -never, (8, length))
    rows[0, rng.random(length) < 0.3] = never
    rows[1], rows[2], rows[3:6] = rng.integers(-2, 3, length), 7, never
    rows[3, [length // 2, length - 1]] = -5
    rows[4, [length // 2, length - 1]] = never + 1, -never - 1
    return rows.astype(np.int32)


def _largest(row: np.ndarray, count: int, places: range) -> list[int]:
    there = [i for i in places if row[i] != largest_gpu.NEVER]
    return sorted(sorted(there, key=lambda i: (row[i], i), reverse=True)[:count])


ROWS = [(256, 5, True), (256, 300, True), (768, 700, True), (6144, 900, True), (8192, 900, False)]


@needs_interpreter
@pytest.mark.parametrize(("length", "count", "resident"), usually(ROWS, *ROWS[:2], *ROWS[3:], newest=ROWS[3:]))
def test_largest_numbers_are_found(length: int, count: int, resident: bool, monkeypatch: pytest.MonkeyPatch):
    """In shared memory, and all but one piece not; in a part of the row, outside of which numbers are larger, where it has several."""
    if not resident:
        monkeypatch.setattr(largest_gpu, "MAX_BARRIERS", 1)
    rows, places, bounds = _rows(length), range(length), None
    if length > 2 * largest_gpu.PIECE:
        places = range(largest_gpu.PIECE, length)
        rows[:, : places.start] = 1 << 30
        bounds = jnp.asarray([[places.start, places.stop]] * 3 + [[0, 0]], jnp.int32)
    with gpu.interpreting(), target("h100"):
        find = cases.quick_jit(lambda rows: largest_gpu.largest_bits(rows, count, bounds))
        bits = jax.block_until_ready(find(jnp.asarray(rows)))
    found = np.asarray(cases.quick_jit(lambda bits: largest_gpu.places_of(bits, count))(bits))
    for i, (row, got) in enumerate(zip(rows, found, strict=True)):
        expected = _largest(row, count, range(0) if bounds is not None and i >= 6 else places)
        assert got[got >= 0].tolist() == expected and (got[len(expected) :] == -1).all(), i


@pytest.mark.parametrize(("words", "count"), [(1, 40), (3, 50), (64, 7), (70, 1200)])
def test_places_are_those_of_the_bits(words: int, count: int):
    rng = np.random.default_rng(words)
    shown = rng.random((5, 32 * words)) < np.array([0.5, 0.02, 0.98, 0, 1])[:, None]
    bits = np.packbits(shown, axis=1, bitorder="little").view(np.int32)
    found = np.asarray(largest_gpu.places_of(jnp.asarray(bits), count))
    for row, got in zip(shown, found, strict=True):
        expected = np.flatnonzero(row)[:count]
        assert (got == np.pad(expected, (0, count - len(expected)), constant_values=-1)).all()


def test_numbers_are_in_the_order_of_scores():
    x = jnp.asarray([-np.inf, -3e38, -1.5, -1e-37, -0.0, 0.0, 1e-37, 2.0, np.inf], jnp.float32)
    words = np.asarray(scores_gpu.in_order(x))
    assert (np.sign(np.diff(words)) == np.sign(np.diff(np.asarray(x)))).all() and words.min() > largest_gpu.NEVER


@pytest.mark.skipif(jax.__version_info__ < gpu.MIN_JAX, reason="older JAX is the reason that is given")
def test_unsupported_says_why():
    def reason(**fields: Any) -> str | None:
        call, arrays = call_of(SCORES["softmax"])
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()} | fields.pop("arrays", {})
        with target(fields.pop("generation", "h100")):
            return pallas_gpu.unsupported(call(shapes).replace(**fields))

    def of(dtype: str, channels: int, length: int = 140) -> dict[str, Any]:
        return {"q": jax.ShapeDtypeStruct((2, length, 4, channels), dtype)}

    assert reason() is None
    assert "not a GPU" in str(reason(generation="v5e"))
    assert "chooses by itself" in str(reason(by_group=False))
    assert "1 queries" in str(reason(arrays=of("float32", 16, 1)))
    assert "not float32 or bfloat16" in str(reason(arrays=of("float16", 16)))
    assert "192 channels" in str(reason(arrays=of("float32", 192)))
    assert reason(arrays=of("bfloat16", 128)) is None


def _compiled(generation: str, kind: str, length: int, dtype: str = "bfloat16") -> Any:
    """NSA's choice of 16 blocks by runs, or DSA's of 2,048 tokens, as the public function chooses on a device that is described."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=generation, topology="1x1x1", target_config=TARGETS[generation]
    )
    where = SingleDeviceSharding(topology.devices[0])
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct((1, length, *shape), dtype, sharding=where)
    scored = length // 16 if kind == "runs" else length
    blocks = jax.ShapeDtypeStruct((1, scored, 1, 128), dtype, sharding=where)
    numbers = lambda n: jax.ShapeDtypeStruct((1, n), jnp.int32, sharding=where)
    options = {"num_local": 2, "num_first": 1, "top_k": 16, "block_size": 64, "scale": 0.1, "stride": 16, "span": 32}
    weights = None
    if kind == "indexer":
        options, weights = {"num_local": 0, "top_k": 2048, "block_size": 1}, array(64, dtype="float32")

    def choose(q: Any, blocks: Any, weights: Any, at: Tokens, blocks_at: Tokens) -> jax.Array:
        more = {"num_blocks": length // options["block_size"], "by_group": True} | options
        return topk_blocks(q, blocks, blocks_at=blocks_at, at=at, weights=weights, **more).indices

    at, blocks_at = (Tokens(None, numbers(n), numbers(n)) for n in (length, scored))
    with target(generation):
        return jax.jit(choose).lower(array(16 if kind == "runs" else 64, 128), blocks, weights, at, blocks_at).compile()


MAX_SPILL = 64
"""Bytes stored and loaded."""


@needs_compiler
@pytest.mark.newest
@pytest.mark.parametrize(
    ("generation", "length", "kind", "dtype"),
    [
        ("h100", 4096, "runs", "bfloat16"),
        ("h100", 4096, "indexer", "bfloat16"),
        *(pytest.param("h100", 4096, kind, "float32", marks=pytest.mark.slow) for kind in ("runs", "indexer")),
        *(
            pytest.param(name, n, kind, "bfloat16", marks=pytest.mark.slow)
            for name in ("h100", "h200")
            for n in (32768, 131072)
            for kind in ("runs", "indexer")
        ),
    ],
)
def test_auto_takes_kernels_that_compile(
    generation: str, length: int, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    text = _compiled(generation, kind, length, dtype).as_text()
    names = {"group_scores", "largest_bits"} | ({"group_normalizers"} if kind == "runs" else set())
    assert all(name in text for name in names) and "sort(" not in text
    captured = capfd.readouterr()
    report = captured.out + captured.err
    assert "serialized" not in report
    spilled = [sum(map(int, found)) for found in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)]
    assert all(n <= MAX_SPILL for n in spilled), report
