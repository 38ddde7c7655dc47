"""Block selection as written: all scores of all queries with all key blocks."""

import jax
import jax.numpy as jnp

from plait.kernels.shapes import accumulation_dtype
from plait.kernels.topk_blocks.call import TopkCall

Array = jax.Array

_FORCED, _NEVER = 1e30, -1e30


def topk_blocks(call: TopkCall) -> Array:
    """See `plait.kernels.topk_blocks`; the indices."""
    ids, blocks, blocks_at = call.at.segment_ids, call.blocks, call.blocks_at
    dtype, num_kv_heads = accumulation_dtype(call.q, blocks), blocks.shape[2]
    own = jnp.where(ids != 0, call.at.positions // call.block_size, -1)[:, :, None]  # [B, T, 1]
    number = blocks_at.positions[:, None, :]  # [B, 1, N]
    same = (blocks_at.segment_ids[:, None, :] == ids[:, :, None]) & (ids != 0)[:, :, None]
    past = same & (number < own)
    grouped = call.q.astype(dtype).reshape(*call.q.shape[:2], num_kv_heads, -1, call.q.shape[-1])
    scores = jnp.einsum("btgrk,bngk->btgrn", grouped, blocks.astype(dtype), precision="highest")
    if call.scale is not None:
        whole = (number + 1) * call.block_size <= call.at.positions[
            :, :, None
        ] + 1  # at its last token a query's own block is, too
        seen = ((past | (number == own)) & whole & same)[:, :, None, None]
        scores = jnp.where(seen, jax.nn.softmax(jnp.where(seen, call.scale * scores, _NEVER), axis=-1), 0)
    scores = scores.sum(3) if call.by_group else scores.reshape(*scores.shape[:2], -1, scores.shape[-1])  # [B, T, Hs, N]
    forced = past & ((number > own - call.num_local) | (number < call.num_first))
    scores = jnp.where(past[:, :, None], scores, _NEVER)
    scores = jnp.where(forced[:, :, None], _FORCED, scores)
    count = scores.shape[-1]
    best, at = jax.lax.top_k(scores[..., ::-1], min(call.top_k - 1, count))  # of equal scores the later block counts more
    numbers = jnp.take_along_axis(jnp.broadcast_to(number[:, :, None], scores.shape), count - 1 - at, axis=-1)
    chosen = jnp.where(best > _NEVER / 2, numbers, -1)
    return jnp.concatenate([jnp.broadcast_to(own[:, :, None], (*chosen.shape[:3], 1)), chosen], axis=-1).astype(jnp.int32)
