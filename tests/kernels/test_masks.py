"""The mask object: its dense form against the rule in plain Python, its key range against its dense form, its errors."""

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.kernels import ChunkMask, GlobalMask, Mask, PowerMask, SelectedBlocks, Tokens, attention
from plait.kernels.attention import chunked
from plait.kernels.attention.visits import FULL, SKIP, Layout, plan_visits
from plait.tests.kernels import loops
from plait.tests.kernels.cases import quick_jit
from plait.tests.tolerances import assert_close


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    window_size, kind = draw(st.none() | st.integers(1, 12)), draw(st.sampled_from(["power", "chunk", "global", "plain"]))
    if kind == "chunk":
        size = draw(st.integers(1, 9))
        shift, kv_shift = (draw(st.integers(0, size - 1)) for _ in range(2))
        chunk = {"chunk_size": size, "shift": shift, "kv_shift": kv_shift, "dilation": draw(st.none() | st.integers(1, 5))}
        return ChunkMask(causal=draw(st.booleans()), num_sink_tokens=draw(st.integers(0, 4)), **chunk)
    if kind == "global":
        window = {"window_size": window_size, "dilation": draw(st.none() | st.integers(1, 5))}
        return GlobalMask(
            num_global_tokens=draw(st.integers(1, 4)), right_window_size=draw(st.none() | st.integers(1, 12)), **window
        )
    if kind == "power":
        return PowerMask(block_size=draw(st.integers(1, 7)), window_size=window_size, num_sink_tokens=draw(st.integers(0, 4)))
    causal, dilation = draw(st.booleans()), draw(st.none() | st.integers(1, 5))
    right = None if causal else draw(st.none() | st.integers(1, 12))
    sinks = 0 if window_size is None and dilation is None and right is None else draw(st.integers(0, 4))
    return Mask(causal=causal, window_size=window_size, num_sink_tokens=sinks, dilation=dilation, right_window_size=right)


@st.composite
def packed(draw: st.DrawFn, length: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions of one packed row, padded before and after."""
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=4)))
    lead, tail = draw(st.integers(0, 9)), draw(st.integers(0, 3))
    index = np.arange(length)
    ids = np.searchsorted(cuts, index, side="right") + 1
    positions = np.maximum(index - np.maximum([0, *cuts], lead)[ids - 1], 0)
    return np.where((index >= lead) & (index < length - tail), ids, 0).astype(np.int32), positions.astype(np.int32)


@settings(max_examples=60, deadline=None)
@given(masks(), packed())
def test_dense_follows_the_rule(mask: Mask, row: tuple[np.ndarray, np.ndarray]):
    ids, positions = row
    dense = np.asarray(mask.dense(*(jnp.asarray(x) for x in (positions, positions, ids, ids))))
    for i in range(len(ids)):
        for j in range(len(ids)):
            expected = ids[i] == ids[j] != 0 and loops.sees(mask, int(positions[i]), int(positions[j]))
            assert dense[i, j] == expected, (i, j)


@settings(max_examples=300, deadline=None)
@given(masks(), packed(), st.sampled_from([3, 8]), st.sampled_from([3, 8]), st.sampled_from([None, 1, 6, 10]), st.integers(0, 9))
def test_visits_follow_the_rule(mask: Mask, row, block_q: int, block_kv: int, size: int | None, seed: int):
    """Every visible tile is visited, no tile is taken for wholly visible that is not, by queries and by keys."""
    ids, positions = row
    length = len(ids)
    dense = np.array(_visible(mask, ids, positions))
    selected = None
    if size is not None:
        count = -(-length // size)
        indices = np.random.default_rng(seed).integers(-1, count, (1, length, 1, 2), np.int32)
        selected = SelectedBlocks(indices=jnp.asarray(indices), block_size=size, num_blocks=count)
        dense &= np.asarray(selected.shown(jnp.asarray(positions)[None]))[0, 0]
        selected = dataclasses.replace(
            selected, indices=jnp.pad(selected.indices, [(0, 0), (0, -length % block_q), (0, 0), (0, 0)])
        )
    sides = [
        Tokens(None, *(jnp.asarray(np.pad(x, (0, -length % block)))[None, None] for x in row)) for block in (block_q, block_kv)
    ]
    layout = Layout(mask, length, length, own_keys=True, packed=True)
    by_query, by_key = plan_visits(layout, *sides, block_q, block_kv, keep_first=True, selected=selected)
    for side, seen, blocks in ((by_query, dense, (block_q, block_kv)), (by_key, dense.T, (block_kv, block_q))):
        entries = np.asarray(side.entries)[0, 0]
        padded = np.pad(seen, [(0, -length % block) for block in blocks])
        tiles = padded.reshape(padded.shape[0] // blocks[0], blocks[0], -1, blocks[1]).swapaxes(1, 2)
        for visited, tile_row in zip(entries, tiles):
            kinds = {entry >> 2: entry & 3 for entry in visited if entry & 3 != SKIP}
            assert len(kinds) == sum(visited & 3 != SKIP)
            for at, tile in enumerate(tile_row):
                assert at in kinds or not tile.any(), "a visible tile is not visited"
                assert kinds.get(at) != FULL or tile.all(), "a tile is taken for wholly visible"


def _visible(mask: Mask, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.asarray(mask.dense(*(jnp.asarray(x) for x in (positions, positions, ids, ids))))


@settings(max_examples=100, deadline=None)
@given(masks(), packed(), st.integers(0, 23), st.integers(1, 24))
def test_key_range_holds_every_visible_key_but_sinks(mask: Mask, row: tuple[np.ndarray, np.ndarray], start: int, size: int):
    ids, positions = row
    dense = np.array(mask.dense(*(jnp.asarray(x) for x in (positions, positions, ids, ids))))
    low, high = mask.key_range(start, start + size, len(ids))
    outside = np.ones(len(ids), bool)
    outside[max(low, 0) : high] = False
    outside[positions < mask.num_sink_tokens] = False
    assert 0 <= low <= high <= len(ids)
    assert not dense[start : start + size, outside].any()


@settings(max_examples=8, deadline=None)
@given(masks(), packed())
def test_blocks_match_dense(mask: Mask, row: tuple[np.ndarray, np.ndarray]):
    ids = jnp.asarray(row[0])[None]
    q, k, v = (jnp.asarray(np.random.default_rng(i).standard_normal((1, 24, 1, 4)), jnp.float32) for i in range(3))
    tile, block = chunked.DENSE_TILE, chunked.BLOCK_SIZE
    chunked.DENSE_TILE, chunked.BLOCK_SIZE = 0, 8
    try:
        blocks = quick_jit(partial(attention, mask=mask, at=Tokens(None, ids)))(q, k, v)
    finally:
        chunked.DENSE_TILE, chunked.BLOCK_SIZE = tile, block
    whole = quick_jit(partial(attention, mask=mask, at=Tokens(None, ids), implementation="reference"))(q, k, v)
    assert_close(blocks, whole)


def test_mask_is_a_dictionary_key():
    assert {Mask(window_size=4): 1}[Mask(window_size=4)] == 1
    assert Mask(window_size=4) != Mask(window_size=5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window_size": 0}, r"mask.window_size=0 must be at least 1"),
        ({"num_sink_tokens": -1}, r"mask.num_sink_tokens=-1 must be at least 0"),
        ({"num_sink_tokens": 4}, r"mask.num_sink_tokens=4 needs a window"),
    ],
)
def test_mask_rejects(fields: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Mask(**fields)
