"""Block selection for some queries at a time, so that the scores of all never exist at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from plait.kernels.topk_blocks import reference
from plait.kernels.topk_blocks.call import TopkCall

Array = jax.Array

MAX_SCORES = 1 << 24
"""Scores that exist at a time."""


def topk_blocks(call: TopkCall) -> Array:
    """See `plait.kernels.topk_blocks`; the indices."""
    return in_runs(call, call.q.shape[2], reference.topk_blocks)


def in_runs(
    call: TopkCall, heads: int, choose: Callable[[TopkCall], Array], *, scores: int | None = None, tile: int = 1
) -> Array:
    """The indices, chosen for some whole tiles of queries at a time, at least one.

    Args:
      heads: of each query there are scores of so many.
      choose: of a call for some queries.
      scores: that exist at a time; None is `MAX_SCORES`.
      tile: queries.
    """
    batch, length = call.q.shape[:2]
    tiles = (scores or MAX_SCORES) // max(1, batch * heads * call.blocks.shape[1] * tile)
    at_a_time = max(1, tiles) * tile
    if at_a_time >= length:
        return choose(call)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -length % at_a_time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, at_a_time, *x.shape[2:]), 1, 0)

    parts = jax.tree.map(cut, {name: getattr(call, name) for name in ("q", "at", "weights")})
    indices = jax.lax.map(lambda part: choose(call.replace(**part)), parts)
    return jnp.moveaxis(indices, 0, 1).reshape(batch, -1, *indices.shape[3:])[:, :length]
