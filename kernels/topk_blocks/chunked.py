"""Block selection for some queries at a time, so that the scores of all never exist at once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.tokens import Tokens
from plait.kernels.topk_blocks.call import TopkCall
from plait.kernels.topk_blocks.reference import key_blocks, query_blocks, select

Array = jax.Array

MAX_SCORES = 1 << 24
"""Scores that exist at a time."""


def topk_blocks(call: TopkCall) -> Array:
    """See `plait.kernels.topk_blocks`; the table's array."""
    side = Tokens(segment_ids=call.segment_ids).placed(*call.q.shape[:2])
    blocks = key_blocks(call, side)
    choose: Any = partial(select, call=call, blocks=blocks)
    q, first, ids, positions = query_blocks(call, side)
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
