"""Block selection for Hopper (Mosaic GPU) where the heads of a group choose together: scores summed by a kernel, the largest found by another.

The scores of every head never exist: XLA would write them and read them again for each step of a softmax, and then sort. What is left to XLA
is the sum over the runs of a block, and the numbers of the bits that are set. Tokens by their scores alone (DSA) stay numbers of 32 bits from
one kernel to the other, of which nothing is written that no query of a tile can see.
"""

import jax
import jax.numpy as jnp

from plait.kernels import gpu
from plait.kernels.topk_blocks import chunked, largest_gpu, reference, scores_gpu
from plait.kernels.topk_blocks.call import TopkCall
from plait.kernels.topk_blocks.tiles import unfit

Array = jax.Array

MAX_SCORES = 1 << 25
"""Scores that exist at a time."""


def unsupported(call: TopkCall) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if reason := gpu.unavailable() or unfit(call):
        return reason
    if call.blocks.shape[1] > largest_gpu.MAX_LENGTH:
        return f"{call.blocks.shape[1]} exceed the {largest_gpu.MAX_LENGTH} among which it finds the largest"
    if scores_gpu.tiles_of(call) is None:
        return f"{call.q.shape[3]} channels of {call.q.dtype} and {call.blocks.dtype} exceed the {gpu.MAX_SMEM} bytes of shared memory"
    return None


def topk_blocks(call: TopkCall) -> Array:
    """See `plait.kernels.topk_blocks`; the indices, of tokens in their order."""
    choose = _tokens if call.tokens_alone else _blocks
    return chunked.in_runs(call, call.blocks.shape[2], choose, scores=MAX_SCORES, tile=scores_gpu.QUERIES)


def _blocks(call: TopkCall) -> Array:
    return reference.choose(call, scores_gpu.scores(call), _largest, blocks_of)


def blocks_of(call: TopkCall, scores: Array) -> Array:
    """As `reference.blocks_of`; where the runs of a segment stand together, and none is missing inside padding, they are read by place."""
    number, ids = call.blocks_at.positions, call.blocks_at.segment_ids
    before = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
    goes_on = (ids == before(ids)) & (number == before(number) + 1)
    in_order = (ids == 0) | (number == 0) | goes_on
    return jax.lax.cond(in_order.all(), by_place, reference.blocks_of, call, scores)


def by_place(call: TopkCall, scores: Array) -> Array:
    """The same where the runs of every segment stand together and in order, their numbers one after the other."""
    step, shares = reference.shares_of_runs(call)
    count = scores.shape[3]
    place = jnp.arange(count, dtype=jnp.int32)[None, None]
    own = call.blocks_at.segment_ids[:, None] == call.at.segment_ids[:, :, None]  # [B, T, N]
    end = jnp.where(own, place + 1, 0).max(2)[:, :, None, None]
    begin = jnp.where(own, place - call.blocks_at.positions[:, None], count).min(2)[:, :, None, None]
    first = step * jnp.arange(call.num_blocks, dtype=jnp.int32)[None, None, None]
    total = jnp.zeros((*scores.shape[:3], call.num_blocks), scores.dtype)
    for i, share in shares.items():
        at = begin + first + i
        found = jnp.take_along_axis(scores, jnp.clip(at, 0, count - 1), axis=3, mode="clip")
        total += share * jnp.where((first + i >= 0) & (at < end), found, 0)
    return total


def _largest(scores: Array, count: int) -> Array:
    """The places of the largest scores, as `reference.choose` asks for them."""
    if count == 0:
        return jnp.zeros((*scores.shape[:-1], 0), jnp.int32)
    words = jnp.where(reference.is_never(scores), largest_gpu.NEVER, scores_gpu.in_order(scores))
    size = largest_gpu.LEAST_PART if scores.shape[-1] <= largest_gpu.PIECE else largest_gpu.PIECE
    missing = -scores.shape[-1] % size
    words = jnp.pad(words.reshape(-1, scores.shape[-1]), ((0, 0), (0, missing)), constant_values=largest_gpu.NEVER)
    places = largest_gpu.places_of(largest_gpu.largest_bits(words, count), count)
    return places.reshape(*scores.shape[:-1], count)


def _tokens(call: TopkCall) -> Array:
    length, num_keys = call.q.shape[1], call.blocks.shape[1]
    count = min(call.top_k, num_keys)
    words, bounds = scores_gpu.words(call, largest_gpu.PIECE)
    batch, groups, rows, _ = words.shape
    bounds = jnp.broadcast_to(bounds[:, None], (batch, groups, *bounds.shape[1:]))
    bits = largest_gpu.largest_bits(words.reshape(-1, words.shape[3]), count, bounds.reshape(-1, 2))
    places = largest_gpu.places_of(bits, count).reshape(batch, groups, rows, count)[:, :, :length]
    numbers = jnp.take_along_axis(call.blocks_at.positions[:, None, None], jnp.maximum(places, 0), axis=3, mode="clip")
    return jnp.moveaxis(jnp.where(places >= 0, numbers, -1), 1, 2)
