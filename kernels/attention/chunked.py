"""Attention by blocks of queries, each against the keys that its mask can reach, recomputed in the backward pass."""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels.attention.call import AttentionCall
from plait.kernels.attention.reference import AttentionStats, apply, relative_weights, share
from plait.kernels.shapes import accumulation_dtype, matmul_precision
from plait.kernels.tokens import Tokens

Array = jax.Array

DENSE_TILE = 512 * 512
"""Up to so many query-key pairs a head, one dense tile is fastest and small enough to keep for the backward pass."""

BLOCK_SIZE = 128
"""Queries a block."""

MAX_TILE = 1 << 21
"""Query-key pairs a head that one block holds at most; long key ranges get fewer queries a block."""

MAX_GROUPS = 4
"""Groups of blocks that are compiled apart, so that early causal queries skip late keys; with 4, 5/8 of the square remain."""


def attention(call: AttentionCall) -> tuple[Array, AttentionStats | None]:
    """See `plait.kernels.attention`; always a pair here."""
    q, mask = call.q, call.mask
    length, num_keys = q.shape[1], call.k.shape[1]
    queries, keys = call.sides
    if length == 1 or length * num_keys <= DENSE_TILE:
        return _rows(call, queries, keys)

    block = min(BLOCK_SIZE, max(8, MAX_TILE // num_keys))
    ranges = [mask.key_range(i, i + block, num_keys) if call.own_keys else (0, num_keys) for i in range(0, length, block)]
    dtype = accumulation_dtype(q, call.k, call.v)
    k, v = call.k.astype(dtype), call.v.astype(dtype)  # the gradients of k and v are summed over blocks in this dtype
    anchors = mask.num_sink_tokens if call.own_keys else 0
    starts: Any = queries.starts() if anchors else None

    def run_block(block: tuple[dict[str, Any], Tokens, Array, Array | None], k: Array, v: Array, *, width: int):
        of_queries, queries, low, start = block
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, low, width, axis=1)
        near_k, near_v, near = cut(k), cut(v), jax.tree.map(cut, keys)
        if start is not None:
            index = start[:, None] + jnp.arange(anchors, dtype=start.dtype)[None, :]  # [B, anchors]
            far_k, far_v, far = _anchors(k, v, keys, index, low)
            join = lambda far, near: jnp.concatenate([far, near], axis=1)
            near_k, near_v, near = join(far_k, near_k), join(far_v, near_v), jax.tree.map(join, far, near)
        return _rows(call.replace(k=near_k, v=near_v, **of_queries), queries, near)

    blocks = lambda x: jnp.moveaxis(_pad(x, -length % block).reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)
    of_queries, query_blocks = jax.tree.map(
        blocks, ({name: getattr(call, name) for name in ("q", "query_sinks", "selected", "whole")}, queries)
    )
    outputs = []
    for first, last in groups(ranges):
        width = max(high - low for low, high in ranges[first:last])
        lows = np.minimum([low for low, _ in ranges[first:last]], num_keys - width).astype(np.int32)
        of_block = starts[:, first * block : last * block : block].T if anchors and lows.max() > 0 else None
        body = jax.checkpoint(partial(run_block, width=width))
        cut = lambda x, some=slice(first, last): x[some]
        per_block = (*jax.tree.map(cut, (of_queries, query_blocks)), jnp.asarray(lows), of_block)
        outputs.append(jax.lax.map(lambda x, body=body: body(x, k, v), per_block))
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length], whole)


def _rows(call: AttentionCall, queries: Tokens, keys: Tokens) -> tuple[Array, AttentionStats | None]:
    """Whole rows of attention for the call's queries over its keys."""
    q, precision = call.q, matmul_precision(call.q.dtype)
    if call.whole is not None:
        return share(call, queries, keys, precision)
    p, factor, stats = relative_weights(call, queries, keys, precision)
    factor = jnp.moveaxis(factor, 3, 1).reshape(*q.shape[:3], 1)
    return (apply(p, call.v, precision) * factor).astype(q.dtype), stats


def _anchors(k: Array, v: Array, keys: Tokens, index: Array, low: Array) -> tuple[Array, Array, Tokens]:
    """The keys at `index` [B, n], hidden unless they stand before `low`.

    A block's key range misses only tokens before it, and of the segments in the block only the first query's can begin there, so
    the first tokens of that one segment are all the sink tokens a block can miss.
    """
    before = index < low
    index = jnp.minimum(index, k.shape[1] - 1)
    take = lambda x: jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
    shown = jnp.where(before, take(keys.segment_ids), 0)
    return take(k), take(v), Tokens(segment_ids=shown, positions=take(keys.positions))


def groups(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs [first, last) of the blocks that share a key range width; one run when widths hardly differ."""
    widths = [high - low for low, high in ranges]
    if max(widths) * len(widths) <= 1.25 * sum(widths):
        return [(0, len(ranges))]
    edges = np.linspace(0, len(ranges), min(MAX_GROUPS, len(ranges)) + 1).astype(int).tolist()
    return list(pairwise(edges))


def _pad(x: Array, padding: int) -> Array:
    """x [B, T, ...] with zeros after it: padding tokens, which see nothing."""
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) if padding else x
