"""The mask object: its dense form against the rule in plain Python, its key range against its dense form, its errors."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.kernels import Mask, attention
from plait.kernels.attention import chunked
from plait.tests.kernels.cases import quick_jit
from plait.tests.tolerances import assert_close


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    window_size = draw(st.none() | st.integers(1, 12))
    sinks = 0 if window_size is None else draw(st.integers(0, 4))
    return Mask(causal=draw(st.booleans()), window_size=window_size, num_sink_tokens=sinks)


@st.composite
def packed(draw: st.DrawFn, length: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions of one packed row with a padded tail."""
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=4)))
    ids = np.searchsorted(cuts, np.arange(length), side="right") + 1
    positions = np.arange(length) - np.concatenate([[0], cuts]).astype(int)[ids - 1]
    return np.where(np.arange(length) < length - draw(st.integers(0, 3)), ids, 0).astype(np.int32), positions.astype(np.int32)


def _sees(mask: Mask, i: int, j: int) -> bool:
    if mask.causal and j > i:
        return False
    return mask.window_size is None or abs(i - j) < mask.window_size or (j <= i and j < mask.num_sink_tokens)


@settings(max_examples=60, deadline=None)
@given(masks(), packed())
def test_dense_follows_the_rule(mask: Mask, row: tuple[np.ndarray, np.ndarray]):
    ids, positions = row
    dense = np.asarray(mask.dense(*(jnp.asarray(x) for x in (positions, positions, ids, ids))))
    for i in range(len(ids)):
        for j in range(len(ids)):
            expected = ids[i] == ids[j] != 0 and _sees(mask, int(positions[i]), int(positions[j]))
            assert dense[i, j] == expected, (i, j)


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
        blocks = quick_jit(partial(attention, mask=mask, segment_ids=ids))(q, k, v)
    finally:
        chunked.DENSE_TILE, chunked.BLOCK_SIZE = tile, block
    whole = quick_jit(partial(attention, mask=mask, segment_ids=ids, implementation="reference"))(q, k, v)
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
