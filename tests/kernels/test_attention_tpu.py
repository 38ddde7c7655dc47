"""The TPU attention kernel in Pallas' TPU interpreter, with race detection, against the reference; and the tiles it visits."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import (
    ChunkMask,
    DistanceBias,
    GlobalMask,
    Mask,
    PowerMask,
    Tokens,
    routed_attention,
)
from plait.kernels.attention import pallas_tpu
from plait.kernels.attention.call import AttentionCall
from plait.kernels.attention.tpu import best_tiles, tiling
from plait.kernels.attention.visits import FULL, SKIP, Layout, plan_visits
from plait.kernels.chips import CHIPS
from plait.kernels.target import target
from plait.tests.kernels import cases
from plait.tests.kernels.attention_calls import (
    CHOSEN,
    Case,
    assert_mass_matches,
    assert_matches,
    inputs_of,
    own,
    run_checked,
    segments_of,
    small_tiles,
)
from plait.tests.suites import usually
from plait.tests.tolerances import assert_tree_close, in_float64


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)


SINKS = Mask(window_size=9, num_sink_tokens=3)
CASES = {
    "causal": Case(heads=(4, 2), dims=(64, 64)),
    "causal-63-bfloat16": Case(length=63, dims=(32, 16), dtype="bfloat16"),
    "causal-65-without-statistics": Case(length=65, dims=(8, 24), sinks=True, stats=False),
    "full-sigmoid": Case(mask=Mask(causal=False), sigmoid=True, heads=(2, 2), length=130),
    "sigmoid-without-statistics": Case(sigmoid=True, length=63, stats=False),
    "window": Case(mask=Mask(window_size=40), length=256, heads=(1, 1)),
    "two-sided-window": Case(mask=Mask(causal=False, window_size=9, num_sink_tokens=2), segments="several"),
    "window-sinks-segments-bfloat16": Case(mask=SINKS, segments="several", sinks=True, dtype="bfloat16"),
    "segments": Case(segments="several", length=256, heads=(1, 1), dims=(24, 8)),
    "power": Case(mask=PowerMask(block_size=32, window_size=9, num_sink_tokens=2), segments="several", heads=(1, 1), length=300),
    "chunk": Case(
        mask=ChunkMask(chunk_size=48, shift=24, kv_shift=24, num_sink_tokens=2), segments="several", heads=(1, 1), length=300
    ),
    "global": Case(mask=GlobalMask(window_size=9, num_global_tokens=2), segments="several", heads=(1, 1), stats=False),
    "dilated": Case(mask=Mask(window_size=6, dilation=20, num_sink_tokens=1), segments="long", stats=False, dtype="bfloat16"),
    "hidden": Case(segments="none", length=65, sinks=True, heads=(1, 1)),
    "left-padding": Case(mask=SINKS, segments="left", heads=(1, 1), sinks=True),
    "left-padding-sigmoid": Case(segments="left", sigmoid=True, length=130, heads=(1, 1)),
    "low-sinks": Case(segments="left", sinks=True, low=True, length=130),
    "low-sigmoid": Case(segments="several", sigmoid=True, low=True, length=200),
    "soft-cap": Case(segments="several", soft_cap=1.5, sinks=True),
    "soft-cap-sigmoid": Case(soft_cap=2.0, sigmoid=True, length=130, heads=(1, 1)),
    "soft-cap-bias-bfloat16": Case(soft_cap=5.0, bias=True, segments="several", dtype="bfloat16", stats=False),
}


USUAL = (
    "causal-65-without-statistics",
    "full-sigmoid",
    "window-sinks-segments-bfloat16",
    "chunk",
    "global",
    "hidden",
    "left-padding",
    "low-sinks",
    "soft-cap-bias-bfloat16",
)
"""In the default suite: each kind of mask and of row, both normalizers, sinks, and scores beyond the range of exp."""


@pytest.mark.parametrize("name", usually(CASES, *USUAL, newest=("window-sinks-segments-bfloat16", "full-sigmoid")))
def test_kernel_matches_reference(name: str):
    case = CASES[name]
    got = assert_matches(case, inputs_of(case), own(segments_of(case)))
    if name == "hidden":
        assert not any(np.asarray(x).any() for key, x in got["value"].items() if key != "lse")


def test_kernel_matches_reference_with_shuffled_keys():
    case = Case(mask=Mask(window_size=90, num_sink_tokens=2), length=64)
    inputs, rng = inputs_of(case), np.random.default_rng(0)
    longer = {name: jnp.asarray(rng.standard_normal((1, 200, *x.shape[2:])), case.dtype) for name, x in inputs.items()}
    positions = jnp.asarray(rng.permutation(200)[None], jnp.int32)
    tokens = {
        "at": Tokens(None, None, 130 + jnp.arange(64)[None, :]),
        "kv_at": Tokens(None, (positions < 190).astype(jnp.int32), positions),
    }
    assert_matches(case, inputs | {"k": longer["k"], "v": longer["v"]}, tokens)


@pytest.mark.parametrize("share", usually([0.0, 0.4, 1.0], 0.4, newest=(0.4,)))
def test_routed_matches_reference(share: float):
    case = Case(mask=Mask(window_size=90), heads=(4, 2), segments="several", dtype="float32" if share else "bfloat16", sinks=True)
    inputs, rng = inputs_of(case), np.random.default_rng(0)
    active = jnp.asarray(rng.random(inputs["q"].shape[:3]) < share).at[:, :, 0].set(rng.random() < 0.5)

    def run(implementation: str, inputs: dict[str, jax.Array]) -> Any:
        def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
            q, k, v = (inputs[name] for name in "qkv")
            options = {
                "mask": case.mask,
                "at": Tokens(None, segments_of(case)),
                "sinks": inputs["sinks"],
                "logit_soft_cap": 2.0 if share == 1 else None,
            }
            return {"o": routed_attention(q, k, v, active, implementation=implementation, **options)}

        return cases.with_gradients(outputs, inputs)

    plain = cases.quick_jit(partial(run, "reference"))
    got = run_checked(partial(run, "pallas_tpu"), inputs)
    assert_tree_close(got, in_float64(plain, inputs), plain(inputs), dtype=case.dtype)
    assert not np.asarray(got["value"]["o"])[~np.asarray(active)].any()


COLUMNS = [(None, None), ("left", None), ("several", None), ("several", 1.5)]


@pytest.mark.parametrize(("segments", "soft_cap"), usually(COLUMNS, ("left", None), ("several", 1.5), newest=[("several", 1.5)]))
def test_column_mass_matches_reference(segments: str | None, soft_cap: float | None):
    case = Case(mask=Mask(window_size=90), heads=(4, 2), segments=segments, length=200)
    assert_mass_matches(case, soft_cap)


EDGES = {
    "window": Case(mask=Mask(window_size=300), heads=(1, 1), length=700),
    "window-segments": Case(
        mask=Mask(window_size=300, num_sink_tokens=2), heads=(1, 1), length=700, segments="long", stats=False
    ),
    "causal-segments": Case(heads=(2, 1), length=600, segments="several"),
    "power-segments": Case(mask=PowerMask(block_size=512), heads=(1, 1), length=1100, segments="long", stats=False),
    "power-bfloat16": Case(mask=PowerMask(block_size=128), heads=(1, 1), length=1024, dtype="bfloat16"),
}


@pytest.fixture
def tiles_of_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of which order can hide a part, and which have several parts in both directions, of edges in groups; sums of keys lie transposed,
    and with 16 bits products add the weights up."""
    tiles = tiling.Tiles(
        forward=tiling.Tile(512, 512, 256, 256, 128, 128, largest=128),
        gradients=tiling.Tile(256, 256, 128, 128, edge_q=256, edge_kv=256, largest=128),
        sums_by_key_column=True,
    )
    choose = lambda *given: replace(tiles, mass_by_product=jnp.dtype(given[-1]).itemsize == 2)
    monkeypatch.setattr(pallas_tpu, "choose_tiles", choose)


@pytest.mark.parametrize("name", usually(EDGES, *EDGES, newest=("window-segments",)))
def test_kernel_matches_reference_at_edges(name: str, tiles_of_cells: None):
    case = EDGES[name]
    assert_matches(case, inputs_of(case), own(segments_of(case)))


MASKS = (
    Mask(),
    Mask(causal=False),
    Mask(window_size=20),
    SINKS,
    Mask(causal=False, window_size=9, num_sink_tokens=2),
    Mask(causal=False, window_size=30, right_window_size=5),
    Mask(window_size=4, dilation=7),
    PowerMask(block_size=8),
    PowerMask(block_size=16, window_size=5, num_sink_tokens=3),
    PowerMask(block_size=5),
    ChunkMask(chunk_size=32),
    ChunkMask(chunk_size=40, shift=20, kv_shift=20, num_sink_tokens=3),
    ChunkMask(causal=False, chunk_size=24, kv_shift=9),
    GlobalMask(window_size=9, num_global_tokens=2),
)


@pytest.mark.parametrize("layout", [None, "several", "long", "left"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_visits_are_what_is_visible(mask: Mask, layout: str | None):
    block_q, block_kv, length = 8, 16, 160
    ids = None if layout is None else cases.segments(length, layout)
    if layout == "several":
        ids = jnp.where(ids == 4, 1000, ids)  # numbered out of order
    tokens = Tokens(None, ids).placed(cases.BATCH, length)
    tokens = jax.tree.map(lambda x: x[:, None], replace(tokens, segment_ids=tokens.numbered()))
    known = Layout(mask, length, length, own_keys=True, packed=layout is not None)
    visible = np.asarray(mask.dense(tokens.positions, tokens.positions, tokens.segment_ids, tokens.segment_ids))[:, 0]
    tiles = visible.reshape(cases.BATCH, length // block_q, block_q, length // block_kv, block_kv).swapaxes(2, 3)
    some, every = tiles.any((-1, -2)), tiles.all((-1, -2))
    by_query, by_key = plan_visits(known, tokens, tokens, block_q, block_kv, keep_first=False)
    for side, transpose in ((by_query, False), (by_key, True)):
        entries = np.broadcast_to(side.entries[:, 0], (cases.BATCH, *side.entries.shape[2:]))
        kinds = np.full((cases.BATCH, *(some.shape[:0:-1] if transpose else some.shape[1:])), SKIP)
        for b, i, step in np.ndindex(entries.shape):
            if entries[b, i, step] & 3 != SKIP:
                kinds[b, i, entries[b, i, step] >> 2] = entries[b, i, step] & 3
        kinds = kinds.swapaxes(1, 2) if transpose else kinds
        assert not (some & (kinds == SKIP)).any(), "a visible tile is not visited"
        assert not ((kinds == FULL) & ~every).any(), "a tile is taken for wholly visible"
        assert (kinds == SKIP).sum() >= 0.8 * (~some).sum(), "hidden tiles are visited"
        assert layout is not None or ((kinds != SKIP) == some).all()


def test_visits_of_window_are_few():
    layout = Layout(Mask(window_size=100), 10_000, 10_000, own_keys=True, packed=True)
    assert layout.widths(100, 100) == (2, 2)
    assert layout._replace(mask=Mask(window_size=100, num_sink_tokens=4)).widths(100, 100)[0] == 4


def test_unsupported_says_why():
    def reason(q: Any, k: Any, **options: Any) -> str:
        return pallas_tpu.unsupported(
            AttentionCall.of("attention", q=q, k=k, v=k, mask=Mask(), kv_at=Tokens(None, ids), **options)
        )

    shape = lambda length=64, dim=64, dtype=jnp.float32: jax.ShapeDtypeStruct((1, length, 1, dim), dtype)
    ids = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    assert "the backend is cpu" in reason(shape(), shape())
    with target("v5e"):
        assert reason(shape(), shape()) is None
        assert "float16" in reason(shape(dtype=jnp.float16), shape(dtype=jnp.float16))
        assert "1 queries" in reason(shape(1), shape())
        assert "512" in reason(shape(dim=512), shape(dim=512))
        assert "by distance" in reason(shape(), shape(), bias=DistanceBias(slopes=jnp.ones(1)))


def test_tiles_are_checked():
    with pytest.raises(ValueError, match=r"block_q=100 must be a positive multiple of 128"):
        tiling.Tile(block_q=100)


def test_every_generation_has_tiles_for_every_head_dim():
    generations = {chip.generation for chip in CHIPS.values() if chip.platform == "tpu"} - {"v4"}
    assert set(best_tiles.BFLOAT16) == generations
    for by_width in best_tiles.BFLOAT16.values():
        assert max(by_width) == pallas_tpu.MAX_HEAD_DIM
        for tile in (tile for tiles in by_width.values() for tile in (tiles.forward, tiles.gradients)):
            assert tile.block_q % tile.part_q == 0 == tile.block_kv % tile.part_kv
    assert CHOSEN("v6e", 96, 40, jnp.bfloat16) == best_tiles.BFLOAT16["v6e"][128]
    assert CHOSEN("v4", 64, 64, jnp.bfloat16) == best_tiles.BFLOAT16["v5e"][64]
    assert CHOSEN("v6e", 64, 64, jnp.float32) == best_tiles.FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(length=500, heads=(4, 2), dims=(64, 64), segments="several"),
        Case(length=2048, heads=(1, 1), dims=(128, 128), dtype="bfloat16", segments="several", sinks=True),
        Case(length=2048, mask=Mask(window_size=300, num_sink_tokens=4), heads=(1, 1), dims=(64, 64)),
    ],
    ids=["500", "2048-bfloat16", "2048-window"],
)
def test_kernel_matches_reference_with_its_own_tiles(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pallas_tpu, "choose_tiles", CHOSEN)
    assert_matches(case, inputs_of(case), own(segments_of(case)))
