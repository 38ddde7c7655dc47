"""Flash attention for Hopper (Mosaic GPU), forward and backward, with the statistics of each row inside.

With z the scaled logits, one tile of the forward pass updates
  m' = max(m, max_j z_j), p_j = exp(z_j - m'), l <- e^(m-m') l + sum_j p_j, u <- e^(m-m') (u - (m' - m) l) + sum_j p_j (z_j - m')
and o likewise; then lse = m + log l and the entropy is log l - u / l. The backward pass recomputes A, in one kernel over blocks of
queries (dq) and one over blocks of keys (dk and dv, summed over the heads of a group), without atomics. `per_query` has its algebra.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels import gpu
from plait.kernels.attention.call import AttentionCall, RoutedCall
from plait.kernels.attention.gpu import chosen_tokens, gradients, kernels
from plait.kernels.attention.gpu.kernels import BLOCK, Operands, Problem, Tiles
from plait.kernels.attention.per_query import gradient_rows, with_bias, with_sinks
from plait.kernels.attention.reference import AttentionStats, lse_alone
from plait.kernels.attention.ties import longest_keys, ties
from plait.kernels.attention.visits import Layout, laid_out
from plait.kernels.tokens import Tokens

Array = jax.Array

MIN_QUERIES = 32
"""Fewer queries than this (decoding) fill too little of a tile."""

MAX_HEAD_DIM = 256
"""Columns of one `wgmma` product."""


def choose_tiles(key_dim: int, value_dim: int, crowded: bool = False) -> Tiles:
    """Tiles whose shared memory and registers fit; `crowded` where the gradients hold the logits beside the weights."""
    wide = max(key_dim, value_dim)
    if wide <= 64:
        return Tiles(block_kv=128, block_kv_dq=64 if crowded else 128, block_q_dkv=64, stages=3)
    if wide <= 128:
        size = 32 if crowded else 64
        return Tiles(block_kv=128, block_kv_dq=size, block_q_dkv=size, stages=2)
    return Tiles(block_kv=64, block_kv_dq=32, block_q_dkv=32, stages=2)


def unsupported(call: AttentionCall) -> str | None:
    """Why this kernel cannot serve a call, of `attention` or `routed_attention`, or None."""
    q, k, v, scale = call.q, call.k, call.v, call.scale
    if reason := gpu.unavailable():
        return reason
    dtypes = {x.dtype.name for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"q, k and v are {', '.join(sorted(dtypes))}, not all bfloat16 or all float16, which wgmma multiplies exactly"
    if call.bias is not None:
        return "it has no bias by distance, only one of low rank"
    if scale <= 0:
        return f"the scale {scale} is not a positive number"
    if call.selected is not None and not call.document_keys:
        return "blocks are selected among keys that are not the tokens of the queries' documents, in order"
    if _gathers(call):
        return chosen_tokens.unsupported(call)
    for dim in (q.shape[-1], v.shape[-1]):
        if dim % 16 or dim > MAX_HEAD_DIM:
            return f"head dim {dim} is no multiple of 16 up to {MAX_HEAD_DIM}"
    if (needed := _shared_memory(q.shape[-1], v.shape[-1])) > gpu.MAX_SMEM:
        return f"head dims {q.shape[-1]} and {v.shape[-1]} need {needed} bytes of shared memory of {gpu.MAX_SMEM}"
    if q.shape[1] < MIN_QUERIES or k.shape[1] < MIN_QUERIES:
        return f"{q.shape[1]} queries and {k.shape[1]} keys fill no tile of at least {MIN_QUERIES}"
    if call.selected is not None:
        tiles = _tiles(call)
        for size in (tiles.block_kv, tiles.block_kv_dq, BLOCK):
            if reason := call.selected.unfit(size):
                return reason
    return None


def _gathers(call: AttentionCall) -> bool:
    """Whether queries choose tokens one by one."""
    return call.selected is not None and call.selected.block_size == 1


def _tiles(call: AttentionCall) -> Tiles:
    crowded = (call.sigmoid and call.return_stats) or call.logit_soft_cap is not None
    return choose_tiles(call.q.shape[-1], call.v.shape[-1], crowded)


def _shared_memory(key_dim: int, value_dim: int) -> int:
    """Bytes that the forward kernel needs, of all kernels the most."""
    tiles = choose_tiles(key_dim, value_dim)
    own = key_dim if key_dim == value_dim else key_dim + value_dim
    return 2 * (BLOCK * own + tiles.stages * tiles.block_kv * (key_dim + value_dim)) + (4 << 10)


def _problem(call: AttentionCall, layout: Layout) -> Problem:
    """Args: `layout` of the sides before they are padded."""
    length, num_keys = (-(-n // BLOCK) * BLOCK for n in (layout.num_queries, layout.num_keys))
    return Problem(
        layout=layout._replace(num_queries=length, num_keys=num_keys),
        num_keys=layout.num_keys,
        tiles=_tiles(call),
        scale=call.scale,
        sigmoid=call.sigmoid,
        stats=call.return_stats,
        soft_cap=call.logit_soft_cap,
        block_size=None if call.selected is None else call.selected.block_size,
    )


def attention(call: AttentionCall) -> tuple[Array, AttentionStats | None]:
    """See `plait.kernels.attention`; always a pair here."""
    if _gathers(call):
        return chosen_tokens.attention(call)
    length, num_heads = call.q.shape[1:3]
    layout, queries, keys = laid_out(call)
    queries, keys = jax.tree.map(lambda x: _pad(x)[:, None], (queries, keys))
    bias = jnp.zeros(num_heads, jnp.float32) if call.sigmoid_bias is None else call.sigmoid_bias.astype(jnp.float32)
    selected = jax.tree.map(_pad, call.selected)
    q, k, v = (_pad(x) for x in (call.q, call.k, call.v))
    whole = None
    if call.whole is not None:
        whole = _pad(call.whole[0]), (jnp.swapaxes(_pad(call.whole[1]), 1, 2),)
    o, rows = _flash(_problem(call, layout), Operands(q, k, v, bias, queries, keys, selected), whole)
    o, stats = o[:, :length], [jnp.swapaxes(x, 1, 2)[:, :length] for x in rows]
    if call.sink_logits is not None:
        o, stats = with_sinks(o, stats, call.sink_logits)
    if call.return_lse and not call.return_stats:
        return o, lse_alone(stats[0])
    return o, AttentionStats(*stats) if call.return_stats else None


def routed_attention(call: RoutedCall) -> Array:
    """See `plait.kernels.routed_attention`: each head's queries are gathered at its front, and tiles without one are not visited."""
    active, (length, num_heads) = call.active, call.q.shape[1:3]
    own, tokens = call.sides
    if call.own_keys:
        own = tokens = replace(tokens, segment_ids=tokens.numbered())
    order = jnp.argsort(~active, axis=1, stable=True)  # [B, T, H]
    back = jnp.argsort(order, axis=1)
    gather = lambda x: jnp.take_along_axis(jnp.broadcast_to(x, active.shape), order, axis=1)
    segment_ids = gather(jnp.where(active, own.segment_ids[..., None], 0))
    queries = Tokens(segment_ids=segment_ids, positions=gather(own.positions[..., None]))
    queries = jax.tree.map(lambda x: jnp.swapaxes(_pad(x), 1, 2), queries)
    keys = jax.tree.map(lambda x: _pad(x)[:, None], tokens)
    q, k, v = (_pad(x) for x in (_permuted(call.q, order, back), call.k, call.v))
    problem = _problem(call, Layout(call.mask, length, call.k.shape[1], own_keys=False, packed=True))
    o, (lse,) = _flash(problem, Operands(q, k, v, jnp.zeros(num_heads, jnp.float32), queries, keys), None)
    if call.sinks is not None:
        o, _ = with_sinks(o, [jnp.swapaxes(lse, 1, 2)], call.sinks[None, None])
    return _permuted(o[:, :length], back, order)


@jax.custom_vjp
def _permuted(x: Array, order: Array, back: Array) -> Array:
    """x [B, T, H, K] with the tokens of each head in `order` [B, T, H], whose inverse is `back`."""
    return jnp.take_along_axis(x, order[..., None], axis=1)


_permuted.defvjp(
    lambda x, order, back: (_permuted(x, order, back), (order, back)),
    lambda saved, d_x: (_permuted(d_x, saved[1], saved[0]), None, None),
)


def _pad(x: Array) -> Array:
    """[B, T, ...] to a whole number of blocks of tokens."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % BLOCK)] + [(0, 0)] * (x.ndim - 2))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(problem: Problem, x: Operands, whole: Any) -> tuple[Array, tuple[Array, ...]]:
    """`kernels.forward` with its gradients; where the `whole` is known, with those of these keys' share in it (see `AttentionCall`)."""
    return _flash_forward(problem, x, whole)[0]


def _flash_forward(problem: Problem, x: Operands, whole: Any) -> Any:
    o, rows = kernels.forward(problem, x) if whole is None else whole
    return (o, with_bias(rows, x.bias) if problem.sigmoid and problem.stats else rows), (x, o, rows)


def _flash_backward(problem: Problem, saved: Any, cotangents: tuple[Array, tuple[Array, ...]]) -> Any:
    x, o, rows = saved
    d_o, d_rows = cotangents
    delta = jnp.einsum("bthv,bthv->bht", d_o.astype(jnp.float32), o.astype(jnp.float32))
    queries, keys = jax.tree.map(lambda x: x[:, 0], (x.queries, x.keys))
    near = lambda: jnp.swapaxes(ties(problem.scale, x.q, longest_keys(problem.layout, queries, keys, x.k)), 1, 2)
    bias = x.bias if problem.sigmoid else None
    read = gradient_rows(rows, d_rows, delta, sigmoid_bias=bias, near=near, soft_cap=problem.soft_cap)
    rows = gradients.in_units(rows, read, sigmoid=problem.sigmoid)
    if problem.sigmoid and problem.stats:
        d_o = (d_o * jnp.swapaxes(read[-1], 1, 2)[..., None]).astype(d_o.dtype)
    d_q, d_bias = gradients.query_gradients(problem, x, d_o, rows)
    d_k, d_v = gradients.key_gradients(problem, x, d_o, rows)
    return Operands(d_q, d_k, d_v, d_bias, None, None), None


_flash.defvjp(_flash_forward, _flash_backward)
