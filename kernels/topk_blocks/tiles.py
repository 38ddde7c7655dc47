"""What a kernel of block selection reads: queries a tile, what is scored a chunk, and which chunks a tile reaches.

`Tiles` is as TPU kernels read it; the functions are for any kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from plait.kernels.shapes import padded
from plait.kernels.topk_blocks import reference
from plait.kernels.topk_blocks.call import TopkCall

Array = jax.Array

QUERIES = 128
"""Queries a tile."""

MIN_QUERIES = 32
"""Fewer queries than this (decoding) fill too little of a tile."""


def unfit(call: TopkCall) -> str | None:
    """Why no kernel that goes by tiles can serve a call, or None."""
    if not call.by_group:
        return "each head chooses by itself: there are no sums of heads"
    if call.q.shape[1] < MIN_QUERIES:
        return f"{call.q.shape[1]} queries fill no tile of at least {MIN_QUERIES}"
    if not {call.q.dtype.name, call.blocks.dtype.name} <= {"float32", "bfloat16"}:
        return f"q and blocks are {call.q.dtype} and {call.blocks.dtype}, not float32 or bfloat16"
    return None


def shared_dtype(call: TopkCall) -> Any:
    """The dtype of the products' operands."""
    return jnp.promote_types(call.q.dtype, call.blocks.dtype)


class Tiles(NamedTuple):
    """Padded to whole tiles and chunks; a kernel's grid is (B, Hkv, tiles, steps), the reach its scalars."""

    q: Array
    """[B, H, T, K]."""
    c: Array
    """[B, Hkv, N, K]."""
    rows: Array
    """int32 [B, 1, 2, T]: segment ids, -1 of padding, and the last number that a query has a score for."""
    tokens: Array
    """int32 [B, 1, 2, N]: segment ids and numbers."""
    weights: tuple[Array, ...]
    """float32 [B, Hkv, H/Hkv, T], where there are any."""
    reach: Array
    """int32 [B * tiles]: chunks up to the last that has something to score for a tile, or might."""
    chunk: int

    @classmethod
    def of(cls, call: TopkCall, chunk: int) -> Tiles:
        """Those of a call, with chunks of so many."""
        batch, length, num_heads, _ = call.q.shape
        queries, scored = (lambda x, axis: padded(x, axis, QUERIES)), (lambda x, axis: padded(x, axis, chunk))
        dtype, num_kv_heads = shared_dtype(call), call.blocks.shape[2]
        q = queries(jnp.swapaxes(call.q.astype(dtype), 1, 2), 2)
        c = scored(jnp.swapaxes(call.blocks.astype(dtype), 1, 2), 2)
        rows, tokens = queries(query_rows(call), 2), scored(scored_rows(call), 2)
        reach = bounds(rows, tokens, QUERIES, chunk)[:, :, 1].reshape(-1)
        weights: tuple[Array, ...] = ()
        if call.weights is not None:
            by_head = jnp.swapaxes(call.weights.astype(jnp.float32), 1, 2)
            weights = (queries(by_head.reshape(batch, num_kv_heads, num_heads // num_kv_heads, length), 3),)
        return cls(q, c, rows[:, None], tokens[:, None], weights, reach, chunk)

    @property
    def num_tiles(self) -> int:
        return self.q.shape[2] // QUERIES

    @property
    def num_chunks(self) -> int:
        return self.c.shape[2] // self.chunk

    def chunk_of(self, b: Array, i: Array, step: Array, reach: Any) -> Array:
        """The chunk that a step of tile i reads: its own, or the last that is reached."""
        return jnp.minimum(step, jnp.maximum(reach[b * self.num_tiles + i] - 1, 0))

    def queries(self, x: Array) -> pl.BlockSpec:
        """Of the q, rows or weights of a tile."""
        if x is self.q:
            group = x.shape[1] // self.c.shape[1]
            return pl.BlockSpec((1, group, QUERIES, x.shape[3]), lambda b, g, i, s, reach: (b, g, i, 0))
        of_group = x is not self.rows
        return pl.BlockSpec((1, 1, x.shape[2], QUERIES), lambda b, g, i, s, reach: (b, g if of_group else 0, 0, i))


def query_rows(call: TopkCall) -> Array:
    """int32 [B, 2, T]: segment ids of the queries, -1 of padding, and the last number that each has a score for."""
    ids = call.at.segment_ids
    return jnp.stack([jnp.where(ids == 0, -1, ids), reference.last_scored(call)], axis=1)


def scored_rows(call: TopkCall) -> Array:
    """int32 [B, 2, N]: segment ids of what is scored, 0 where there is none, and numbers."""
    return jnp.stack([call.blocks_at.segment_ids, call.blocks_at.positions], axis=1)


def bounds(rows: Array, tokens: Array, queries: int, chunk: int) -> Array:
    """The first of `reached`."""
    return reached(rows, tokens, queries, chunk)[0]


def reached(rows: Array, tokens: Array, queries: int, chunk: int) -> tuple[Array, Array]:
    """Which chunks a tile of queries has something to score in, or might, by their segments and numbers from the first to the last.

    Returns:
      int32 [B, tiles, 2], the first chunk and the one after the last; int32 [B, tiles, chunks], 1 where all queries have scores for all.
    """
    batch, some = rows.shape[0], jnp.iinfo(jnp.int32).max
    (ids, last), (of_chunk, numbers) = (
        jnp.moveaxis(x.reshape(batch, 2, -1, size), 1, 0) for x, size in ((rows, queries), (tokens, chunk))
    )
    first = lambda x, real: jnp.where(real, x, some).min(2)
    seen = first(ids, ids > 0)[:, :, None] <= of_chunk.max(2)[:, None]
    seen &= first(of_chunk, of_chunk > 0)[:, None] <= ids.max(2)[:, :, None]
    seen &= first(numbers, of_chunk > 0)[:, None] <= jnp.where(ids > 0, last, -1).max(2)[:, :, None]
    count = seen.shape[2]
    place = jnp.arange(count, dtype=jnp.int32)
    end = jnp.where(seen, place + 1, 0).max(2)
    limits = jnp.stack([jnp.minimum(jnp.where(seen, place, count).min(2), end), end], axis=2)
    whole = numbers.max(2)[:, None] <= last.min(2)[:, :, None]
    for least, most in ((ids.min(2), of_chunk.max(2)), (ids.max(2), of_chunk.min(2))):
        whole &= (least[:, :, None] == most[:, None]) & (most > 0)[:, None]
    return limits, whole.astype(jnp.int32)
