"""The rows of keys that queries choose, against the rule in plain Python."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Mask, Tokens
from plait.kernels.attention.call import AttentionCall
from plait.kernels.attention.chosen_rows import chosen_rows
from plait.kernels.masks import SelectedBlocks
from plait.tests.kernels import cases

LENGTH, HEADS, CHOSEN = 37, 2, 9
MASKS = {
    "causal": Mask(),
    "all": Mask(causal=False),
    "window": Mask(window_size=6),
    "sinks": Mask(window_size=4, num_sink_tokens=2),
}


def _expected(mask: Mask, indices: np.ndarray, most: int, queries: tuple[Any, Any], keys: tuple[Any, Any]) -> np.ndarray:
    """For each number of each query the row of the key at that position of the query's segment, if it is seen, else -1."""
    (ids, places), (key_ids, key_places) = queries, keys
    visible = np.asarray(mask.dense(places, key_places, ids, key_ids))
    found = np.full(indices.shape, -1)
    for b, t, h, n in np.ndindex(*indices.shape):
        rows = np.flatnonzero(visible[b, t] & (key_places[b] == indices[b, t, h, n]))
        if rows.size and indices[b, t, h, n] < most:
            [found[b, t, h, n]] = rows
    return found


def _indices(longest: int) -> np.ndarray:
    """Distinct numbers in any order, of which some are none, and some beyond the segment or num_blocks."""
    rng = np.random.default_rng(3)
    count = cases.BATCH * LENGTH * HEADS
    drawn = np.stack([rng.permutation(longest + 2)[:CHOSEN] for _ in range(count)])
    drawn = np.where(rng.random(drawn.shape) < 0.2, -1, drawn)
    return drawn.reshape(cases.BATCH, LENGTH, HEADS, CHOSEN).astype(np.int32)


def _call(at: Tokens | None, indices: np.ndarray, most: int, num_keys: int = LENGTH, **options: Any) -> AttentionCall:
    q, k = jnp.zeros((cases.BATCH, indices.shape[1], 2, 8)), jnp.zeros((cases.BATCH, num_keys, 1, 8))
    selected = SelectedBlocks(indices=jnp.asarray(indices), block_size=1, num_blocks=most)
    return AttentionCall.of("attention", q=q, k=k, value_dim=4, at=at, selected=selected, **options)


@pytest.mark.parametrize("layout", [None, "one", "several", "left", "inside"])
@pytest.mark.parametrize("name", MASKS)
def test_rows_are_those_of_the_rule(name: str, layout: str | None):
    ids = (
        jnp.ones((cases.BATCH, LENGTH), jnp.int32) if layout is None else cases.segments(LENGTH, layout.replace("inside", "one"))
    )
    if layout == "inside":
        ids = ids.at[:, 5:9].set(0)  # padding between two tokens of one segment
    at = Tokens(None, ids).placed(cases.BATCH, LENGTH)
    side = np.asarray(at.segment_ids), np.asarray(at.positions)
    most = int(np.asarray(at.positions).max()) - 1
    indices = _indices(int(np.where(side[0] > 0, side[1], 0).max()))
    call = _call(None if layout is None else Tokens(None, ids), indices, most, mask=MASKS[name])
    expected = _expected(MASKS[name], indices, most, side, side)
    np.testing.assert_array_equal(jax.jit(chosen_rows)(call), expected)
    assert (expected >= 0).any() and (expected < 0).any()


@pytest.mark.parametrize(("first", "dropped"), [(12, 0), (20, 14)])
def test_rows_of_keys_that_other_devices_sent(first: int, dropped: int):
    """The queries are a part of the row, the keys all of it, or only those from some token on."""
    ids = cases.segments(LENGTH, "several")
    row = Tokens(None, ids).placed(cases.BATCH, LENGTH)
    keys = jax.tree.map(lambda x: x[:, dropped:], row)
    queries = jax.tree.map(lambda x: x[:, first:], row)
    most = LENGTH
    indices = _indices(int(np.asarray(row.positions).max()))[:, first:]
    call = _call(queries, indices, most, LENGTH - dropped, mask=Mask(), kv_at=keys, kv_in_order=True)
    sides = [(np.asarray(x.segment_ids), np.asarray(x.positions)) for x in (queries, keys)]
    expected = _expected(Mask(), indices, most, *sides)
    np.testing.assert_array_equal(jax.jit(chosen_rows)(call), expected)
    assert (expected >= 0).any() and (expected < 0).any()
