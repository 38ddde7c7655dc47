"""Slots of a cache: which tokens it holds, and where."""

import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Tokens
from plait.models.layers.cache import Cache, Slots
from plait.tests.models.common import left_padded


def written(slots: Slots, cache: Cache, at: Tokens) -> Cache:
    """The cache with tokens whose entry is their position."""
    return slots.write(cache, {"k": at.positions[..., None].astype(jnp.float32)}, at)


def held(cache: Cache, row: int) -> dict[int, int]:
    """The positions in a row's slots; each slot's entry belongs to its position."""
    found = {slot: int(p) for slot, p in enumerate(cache.positions[row]) if p >= 0}
    assert all(float(cache.entries["k"][row, slot, 0]) == p for slot, p in found.items())
    np.testing.assert_array_equal(cache.at.segment_ids[row], [slot in found for slot in range(cache.positions.shape[1])])
    return found


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        (Slots(), ({p: p for p in range(6)}, {0: 0, 1: 1})),
        (Slots(3), ({0: 3, 1: 4, 2: 5}, {0: 0, 1: 1})),
        (Slots(3, 1), ({0: 0, 3: 3, 1: 4, 2: 5}, {0: 0, 1: 1})),
    ],
    ids=["whole", "window", "window-sinks"],
)
def test_prompts_fill_their_slots_and_padding_none(slots, expected):
    at, _ = left_padded(6, 2)
    cache = written(slots, slots.empty(2, 10, {"k": ((1,), None)}, "float32"), at)
    assert (held(cache, 0), held(cache, 1)) == expected


def test_a_step_takes_the_place_of_the_token_that_leaves_the_window():
    slots = Slots(3, 1)
    cache = written(slots, slots.empty(1, 10, {"k": ((1,), None)}, "float32"), left_padded(6)[0])
    cache = written(slots, cache, Tokens(positions=jnp.array([[6]])))
    assert held(cache, 0) == {0: 0, 1: 4, 2: 5, 3: 6}


def test_only_the_last_document_of_a_prompt_is_kept():
    at = Tokens(None, jnp.array([[1, 1, 1, 1, 2, 2]]), jnp.array([[0, 1, 2, 3, 0, 1]]))
    slots = Slots()
    assert held(written(slots, slots.empty(1, 6, {"k": ((1,), None)}, "float32"), at), 0) == {0: 0, 1: 1}
