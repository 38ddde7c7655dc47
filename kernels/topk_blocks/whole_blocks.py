"""The blocks into which documents are cut for selection and compression: those that are past, from each document's start."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels.shapes import accumulation_dtype
from plait.kernels.tokens import Tokens

Array = jax.Array


class WholeBlocks(NamedTuple):
    """The blocks of a row that have come to their end, in order: N from 1 to T // block_size, however many documents there are."""

    index: Array  # type: ignore[assignment]
    """int32 [B, N, C], where each block's tokens stand in the row."""
    real: Array
    """bool [B, N, C]; False for padding and where there is no block."""
    at: Tokens
    """Segments, 0 where there is no block, and numbers in their segment, int32 [B, N], as `positions`."""

    def gather(self, x: Array) -> Array:
        """The tokens [B, N, C, ...] of x [B, T, ...]; what is not real is any."""
        batch, count, size = self.index.shape
        flat = self.index.reshape(batch, count * size, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, flat, axis=1).reshape(batch, count, size, *x.shape[2:])

    def mean(self, x: Array) -> Array:
        """The mean over each block's real tokens, [B, N, ...] of x [B, T, ...] in the accumulation dtype; zeros where there is no block."""
        real = self.real.reshape(*self.real.shape, *[1] * (x.ndim - 2))
        total = jnp.sum(jnp.where(real, self.gather(x).astype(accumulation_dtype(x)), 0), axis=2)
        return total / jnp.maximum(real.sum(2), 1).astype(total.dtype)


def whole_blocks(at: Tokens, block_size: int, span: int | None = None) -> WholeBlocks:
    """The blocks of `block_size` tokens that have ended: their last token is there, or a later one of the segment.

    Args:
      at: segments and positions filled in, [B, T]; the tokens of each segment in order.
      block_size: tokens a block, from the segment's start.
      span: tokens C that are given of each, from the block's first one on, those of later blocks too; None is block_size.
    """
    ids, positions = at.segment_ids, at.positions
    batch, length = ids.shape
    count = max(1, length // block_size)
    real, number = ids != 0, positions // block_size
    here = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)
    after = jax.lax.cummin(jnp.where(real, here, length), axis=1, reverse=True)
    after = jnp.pad(after[:, 1:], ((0, 0), (0, 1)), constant_values=length)  # the next real token
    take = lambda x: jnp.take_along_axis(x, jnp.minimum(after, length - 1), axis=1)
    goes_on = (after < length) & (take(ids) == ids)
    ends = real & (((positions + 1) % block_size == 0) | (goes_on & (take(number) != number)))
    last = jnp.sort(jnp.where(ends, here, length), axis=1)[:, :count]  # [B, N]
    found, last = last < length, jnp.minimum(last, length - 1)
    of = lambda x: jnp.take_along_axis(x, last, axis=1)
    own = Tokens(segment_ids=jnp.where(found, of(ids), 0), positions=jnp.where(found, of(number), 0))
    begin = last - (of(positions) - own.positions * block_size)  # a block takes up its places, padding included
    offset = jnp.arange(span or block_size, dtype=jnp.int32)[None, None]
    index = jnp.clip(begin[:, :, None] + offset, 0, length - 1)
    flat = lambda x: jnp.take_along_axis(x, index.reshape(batch, -1), axis=1).reshape(index.shape)
    same = (flat(ids) == own.segment_ids[..., None]) & (flat(positions) == own.positions[..., None] * block_size + offset)
    return WholeBlocks(index, same & found[..., None], own)
