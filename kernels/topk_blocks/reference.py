"""Block selection as written: all scores of all queries with all that is scored."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from plait.kernels.shapes import accumulation_dtype, matmul_precision
from plait.kernels.topk_blocks.call import TopkCall

Array = jax.Array

_FORCED, _NEVER = 1e30, -1e30


def topk_blocks(call: TopkCall) -> Array:
    """See `plait.kernels.topk_blocks`; the indices."""
    return choose(call, scores(call))


def scores(call: TopkCall) -> Array:
    """What each query, or the heads of a group together, gives all that is scored, [B, T, Hs, N]; 0 for what it has no score for."""
    blocks = call.blocks
    dtype, num_kv_heads = accumulation_dtype(call.q, blocks), blocks.shape[2]
    seen = scored(call)
    shared = jnp.promote_types(call.q.dtype, blocks.dtype)
    grouped = call.q.astype(shared).reshape(*call.q.shape[:2], num_kv_heads, -1, call.q.shape[-1])
    products = partial(jnp.einsum, precision=matmul_precision(shared), preferred_element_type=dtype)
    found = products("btgrk,bngk->btgrn", grouped, blocks.astype(shared))
    if call.weights is not None:
        weights = call.weights.astype(dtype).reshape(*found.shape[:-1], 1)
        found = weights * jax.nn.relu(found)
    if call.scale is not None:
        found = jax.nn.softmax(jnp.where(seen[:, :, None, None], call.scale * found, _NEVER), axis=-1)
    found = jnp.where(seen[:, :, None, None], found, 0)
    return found.sum(3) if call.by_group else found.reshape(*found.shape[:2], -1, found.shape[-1])


def choose(
    call: TopkCall,
    scores: Array,
    largest: Callable[[Array, int], Array] | None = None,
    of_blocks: Callable[[TopkCall, Array], Array] | None = None,
) -> Array:
    """The indices, of scores [B, T, Hs, N]; `largest` finds places as `_largest` does, in any order, and `of_blocks` sums as
    `blocks_of`."""
    ids, own = call.at.segment_ids, _own(call)
    number = call.blocks_at.positions[:, None, :]  # [B, 1, N]
    if call.stride is None:
        past = _same(call) & _before(call, number, own)
    else:
        scores, number = (of_blocks or blocks_of)(call, scores), jnp.arange(call.num_blocks, dtype=jnp.int32)[None, None]
        past = (ids != 0)[:, :, None] & _before(call, number, own)
    forced = past & ((number > own - call.num_local) | (number < call.num_first))
    scores = jnp.where(past[:, :, None], scores, _NEVER)
    scores = jnp.where(forced[:, :, None], _FORCED, scores)
    count = scores.shape[-1]
    at = (largest or _largest)(scores, min(call.top_k - (call.num_local > 0), count))
    numbers = jnp.take_along_axis(jnp.broadcast_to(number[:, :, None], scores.shape), jnp.maximum(at, 0), axis=-1)
    chosen = jnp.where(at >= 0, numbers, -1)
    if not call.num_local:
        return chosen.astype(jnp.int32)
    return jnp.concatenate([jnp.broadcast_to(own[:, :, None], (*chosen.shape[:3], 1)), chosen], axis=-1).astype(jnp.int32)


def is_never(scores: Array) -> Array:
    """Of scores as `choose` shows them, what may not be chosen."""
    return scores <= _NEVER / 2


def _largest(scores: Array, count: int) -> Array:
    """The places int32 [..., count] of the largest scores [..., N], of equal ones the later; -1 where there are fewer that may be chosen."""
    best, at = jax.lax.top_k(scores[..., ::-1], count)
    return jnp.where(is_never(best), -1, scores.shape[-1] - 1 - at)


def scored(call: TopkCall) -> Array:
    """bool [B, T, N]: what each query has a score for."""
    return _same(call) & (call.blocks_at.positions[:, None, :] <= last_scored(call)[:, :, None])


def last_scored(call: TopkCall) -> Array:
    """int32 [B, T]: the last number of its segment that each query has a score for; of padding any."""
    if call.scale is None and call.stride is None:
        return _own(call)[:, :, 0] - (call.num_local > 0)
    stride, span = (call.block_size,) * 2 if call.stride is None else (call.stride, call.span)
    return (call.at.positions + 1 - span) // stride  # at its last token a query's own block is whole, too


def _before(call: TopkCall, number: Array, own: Array) -> Array:
    """Whether a block may be chosen by its score: one before the query's own, or, of tokens that are not always chosen, it too."""
    return number < own if call.num_local else number <= own


def _own(call: TopkCall) -> Array:
    """The number [B, T, 1] of each query's own block; -1 of padding."""
    return jnp.where(call.at.segment_ids != 0, call.at.positions // call.block_size, -1)[:, :, None]


def _same(call: TopkCall) -> Array:
    """bool [B, T, N]: what is of each query's own segment."""
    ids = call.at.segment_ids[:, :, None]
    return (call.blocks_at.segment_ids[:, None, :] == ids) & (ids != 0)


def blocks_of(call: TopkCall, scores: Array) -> Array:
    """Scores [B, T, Hs, num_blocks] of the blocks of each query's segment, by number, of those [B, T, Hs, N] of the runs over them."""
    step, shares = shares_of_runs(call)
    before = -min(shares)
    runs = jnp.zeros((*scores.shape[:3], call.num_blocks * step), scores.dtype)
    runs = jax.vmap(lambda runs, number, score: runs.at[..., number].add(score, mode="drop"))(
        runs, call.blocks_at.positions, scores
    )
    runs = jnp.pad(runs, ((0, 0),) * 3 + ((before, 0),))
    last = (call.num_blocks - 1) * step + 1
    parts = (share * runs[..., before + i : before + i + last : step] for i, share in shares.items())
    return sum(parts, jnp.zeros((), scores.dtype))


def shares_of_runs(call: TopkCall) -> tuple[int, dict[int, int]]:
    """Runs that begin in a block, and how often each that lies over it, counted from the first of them, has a stride in it."""
    step, reach = call.block_size // call.stride, call.span // call.stride
    return step, {first: sum(0 <= m < step for m in range(first, first + reach)) for first in range(1 - reach, step)}
