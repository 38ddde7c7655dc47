"""Block selection for some queries at a time, so that the scores of all never exist at once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.tokens import Tokens
from plait.kernels.topk_blocks.reference import key_blocks, query_blocks, select

Array = jax.Array

MAX_SCORES = 1 << 24
"""Scores that exist at a time."""


def topk_blocks(
    q: Array, k: Array, *, block_q: int, block_kv: int, by_group: bool, segment_ids: Array | None, **counts: Any
) -> Array:
    """See `plait.kernels.topk_blocks`; the table's array."""
    side = Tokens(segment_ids=segment_ids).placed(*q.shape[:2])
    blocks = key_blocks(k, side, block_kv)
    choose: Any = partial(select, blocks=blocks, block_kv=block_kv, by_group=by_group, **counts)
    q, first, ids, positions = query_blocks(q, side, block_q)
    rows = first.shape[0]
    at_a_time = max(1, MAX_SCORES // (q.shape[0] * q.shape[2] * blocks.start.shape[0]))
    if at_a_time >= rows:
        return choose(q, first, ids, positions)
    padding = -rows % at_a_time

    def cut(x: Array, axis: int) -> Array:
        x = jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, at_a_time, *x.shape[axis + 1 :]), axis, 0)

    parts: Any = (cut(q, 1), cut(first, 0), cut(ids, 1), cut(positions, 1))
    visible = jax.lax.map(lambda part: choose(*part), parts)  # [parts, B, H, M, N]
    visible = jnp.moveaxis(visible, 0, 2)
    return visible.reshape(*visible.shape[:2], -1, visible.shape[-1])[:, :, :rows]
