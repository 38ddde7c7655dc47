"""Block selection as written: all scores of all query blocks with all key blocks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels.shapes import accumulation_dtype
from plait.kernels.tokens import Tokens
from plait.kernels.topk_blocks.call import TopkCall

Array = jax.Array

_FORCED, _NEVER = 1e30, -1e30


class Blocks(NamedTuple):
    """What later queries may know of each key block."""

    mean: Array
    """[B, N, Hkv, K] of the keys of the block's last segment."""
    last: Tokens
    """Of the block's last real token, [B, N]; segment 0 where there is none."""
    start: Array
    """int32 [N], index of the block's first token."""


def key_blocks(call: TopkCall, side: Tokens) -> Blocks:
    """The blocks of keys [B, T, Hkv, K]; T is filled up with padding."""
    k, block_kv, (batch, length) = call.k, call.block_kv, side.segment_ids.shape
    padding = -length % block_kv
    ids, positions = (jnp.pad(x, ((0, 0), (0, padding))).reshape(batch, -1, block_kv) for x in (side.segment_ids, side.positions))
    keys = jnp.pad(k.astype(accumulation_dtype(k)), ((0, 0), (0, padding), (0, 0), (0, 0)))
    keys = keys.reshape(batch, -1, block_kv, *k.shape[2:])
    index = jnp.max(jnp.where(ids != 0, jnp.arange(block_kv), 0), axis=-1, keepdims=True)
    take = lambda x: jnp.take_along_axis(x, index, axis=-1)[..., 0]
    last = Tokens(segment_ids=take(ids), positions=take(positions))
    own = ((ids == last.segment_ids[..., None]) & (ids != 0)).astype(keys.dtype)
    mean = jnp.einsum("bnc,bnchk->bnhk", own, keys, precision="highest") / jnp.maximum(own.sum(-1), 1)[..., None, None]
    return Blocks(mean, last, jnp.arange(0, length + padding, block_kv))


def select(q: Array, first: Array, ids: Array, positions: Array, *, call: TopkCall, blocks: Blocks) -> Array:
    """bool [B, H, M, N] for queries [B, M, H, K] whose blocks begin at index `first` [M], of segment `ids` and `positions` [B, M]."""
    num_kv_heads, count = blocks.mean.shape[2], blocks.start.shape[0]
    grouped = q.astype(blocks.mean.dtype).reshape(*q.shape[:2], num_kv_heads, -1, q.shape[-1])
    scores = jnp.einsum("bmgrk,bngk->bgrmn", grouped, blocks.mean, precision="highest")
    if call.by_group:
        scores = jnp.broadcast_to(scores.sum(2, keepdims=True), scores.shape)
    scores = scores.reshape(scores.shape[0], -1, *scores.shape[3:])  # [B, H, M, N]
    own = (first // call.block_kv)[:, None]
    n = jnp.arange(count)[None, :]
    past = (blocks.start[None, :] + call.block_kv <= first[:, None])[None]
    same = (blocks.last.segment_ids[:, None, :] == ids[:, :, None]) & (ids != 0)[:, :, None]
    start = ((first[None, :] - positions) // call.block_kv)[..., None]  # the block in which the segment begins
    leading = (n[None] >= start) & (n[None] < start + call.num_first) & (n < own)[None]
    local = ((n < own) & (n > own - call.num_local))[None]
    forced = (n == own)[None] | (same & (local | leading))
    scores = jnp.where((past & same)[:, None], scores, _NEVER)
    scores = jnp.where(forced[:, None], _FORCED, scores)
    # Of equal scores the later block counts more.
    best, at = jax.lax.top_k(scores[..., ::-1], min(call.top_k, count))
    chosen = jnp.zeros(scores.shape, bool)
    return jnp.put_along_axis(chosen, count - 1 - at, best > _NEVER / 2, axis=-1, inplace=False)


def query_blocks(call: TopkCall, side: Tokens) -> tuple[Array, Array, Array, Array]:
    """Of each block's first query: [B, M, H, K], its index [M], and its segment and position [B, M]."""
    every = slice(None, None, call.block_q)
    first = jnp.arange(0, call.q.shape[1], call.block_q)
    return call.q[:, every], first, side.segment_ids[:, every], side.positions[:, every]


def topk_blocks(call: TopkCall) -> Array:
    """See `plait.kernels.topk_blocks`; the table's array."""
    side = Tokens(segment_ids=call.segment_ids).placed(*call.q.shape[:2])
    return select(*query_blocks(call, side), call=call, blocks=key_blocks(call, side))
