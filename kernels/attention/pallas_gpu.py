"""Flash attention for Hopper (Mosaic GPU), forward and backward, with the statistics of each row inside.

With z the scaled logits, one tile of the forward pass updates
  m' = max(m, max_j z_j), p_j = exp(z_j - m'), l <- e^(m-m') l + sum_j p_j, u <- e^(m-m') (u - (m' - m) l) + sum_j p_j (z_j - m')
and o likewise; then lse = m + log l and the entropy is log l - u / l. The backward pass recomputes A, in one kernel over blocks of
queries (dq) and one over blocks of keys (dk and dv, summed over the heads of a group), without atomics. `rows` has its algebra.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels import gpu
from plait.kernels.attention import gpu_gradients, gpu_kernels
from plait.kernels.attention.gpu_kernels import BLOCK, Operands, Problem, Tiles
from plait.kernels.attention.reference import AttentionStats, sides
from plait.kernels.attention.rows import gradient_rows, with_sinks
from plait.kernels.attention.schedule import Layout, renumbered
from plait.kernels.masks import BlockTable, Mask
from plait.kernels.tokens import Tokens

Array = jax.Array

MIN_QUERIES = 32
"""Fewer queries than this (decoding) fill too little of a tile."""

MAX_HEAD_DIM = 256
"""Columns of one `wgmma` product."""


def choose_tiles(key_dim: int, value_dim: int, normalizer: str, return_stats: bool) -> Tiles:
    """Tiles whose shared memory and registers fit."""
    wide = max(key_dim, value_dim)
    crowded = normalizer == "sigmoid" and return_stats  # its gradients hold the logits beside the weights
    if wide <= 64:
        return Tiles(block_kv=128, block_kv_dq=64 if crowded else 128, block_q_dkv=64, stages=3)
    if wide <= 128:
        size = 32 if crowded else 64
        return Tiles(block_kv=128, block_kv_dq=size, block_q_dkv=size, stages=2)
    return Tiles(block_kv=64, block_kv_dq=32, block_q_dkv=32, stages=2)


def unsupported(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    normalizer: str,
    return_stats: bool,
    block_table: BlockTable | None = None,
    **_: object,
) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    if reason := _unsupported(q, k, v, scale):
        return reason
    if block_table is not None:
        tiles, own = choose_tiles(q.shape[-1], v.shape[-1], normalizer, return_stats), block_table.block_kv
        for size in (tiles.block_kv, tiles.block_kv_dq, BLOCK):
            if (size % own and own % size) or size > 32 * own:
                return (
                    f"block_table.block_kv={own} is no multiple of a tile of {size} keys, nor a divisor of at least {size // 32}"
                )
    return None


def routed_unsupported(q: Array, k: Array, v: Array, active: Array, *, scale: float, **_: object) -> str | None:
    """Why this kernel cannot serve a call of `routed_attention`, or None."""
    return _unsupported(q, k, v, scale)


def _unsupported(q: Array, k: Array, v: Array, scale: float) -> str | None:
    if reason := gpu.unavailable():
        return reason
    dtypes = {x.dtype.name for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"q, k and v are {', '.join(sorted(dtypes))}, not all bfloat16 or all float16, which wgmma multiplies exactly"
    for dim in (q.shape[-1], v.shape[-1]):
        if dim % 16 or dim > MAX_HEAD_DIM:
            return f"head dim {dim} is no multiple of 16 up to {MAX_HEAD_DIM}"
    if (needed := _shared_memory(q.shape[-1], v.shape[-1])) > gpu.MAX_SMEM:
        return f"head dims {q.shape[-1]} and {v.shape[-1]} need {needed} bytes of shared memory of {gpu.MAX_SMEM}"
    if q.shape[1] < MIN_QUERIES or k.shape[1] < MIN_QUERIES:
        return f"{q.shape[1]} queries and {k.shape[1]} keys fill no tile of at least {MIN_QUERIES}"
    if not isinstance(scale, (int, float)) or scale <= 0:
        return f"the scale {scale} is not a positive number"
    return None


def _shared_memory(key_dim: int, value_dim: int) -> int:
    """Bytes that the forward kernel needs, of all kernels the most."""
    tiles = choose_tiles(key_dim, value_dim, "softmax", True)
    own = key_dim if key_dim == value_dim else key_dim + value_dim
    return 2 * (BLOCK * own + tiles.stages * tiles.block_kv * (key_dim + value_dim)) + (4 << 10)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask,
    segment_ids: Array | None,
    positions: Array | None,
    kv_segment_ids: Array | None,
    kv_positions: Array | None,
    block_table: BlockTable | None,
    scale: float,
    sinks: Array | None,
    normalizer: str,
    sigmoid_bias: Array | float | None,
    return_stats: bool,
) -> tuple[Array, AttentionStats | None]:
    """See `plait.kernels.attention`; always a pair here."""
    length, num_keys = q.shape[1], k.shape[1]
    own_keys = kv_segment_ids is None and kv_positions is None
    packed = not own_keys or segment_ids is not None or positions is not None
    queries, keys = sides(
        q, k, segment_ids=segment_ids, positions=positions, kv_segment_ids=kv_segment_ids, kv_positions=kv_positions
    )
    if own_keys:
        queries = keys = renumbered(queries)
    if not packed:
        queries = keys = jax.tree.map(lambda x: x[:1], queries)
    queries, keys = jax.tree.map(lambda x: _pad(x)[:, None], (queries, keys))
    bias = jnp.broadcast_to(jnp.asarray(0 if sigmoid_bias is None else sigmoid_bias, jnp.float32), (q.shape[2],))
    q, k, v = (_pad(x) for x in (q, k, v))
    problem = Problem(
        layout=Layout(mask=mask, num_queries=q.shape[1], num_keys=k.shape[1], own_keys=own_keys, packed=packed),
        num_keys=num_keys,
        tiles=choose_tiles(q.shape[-1], v.shape[-1], normalizer, return_stats),
        scale=float(scale),
        sigmoid=normalizer == "sigmoid",
        stats=return_stats,
        table_blocks=None if block_table is None else (block_table.block_q, block_table.block_kv),
    )
    table = None if block_table is None else block_table.visible
    o, rows = _flash(problem, Operands(q, k, v, bias, queries, keys, table))
    o, stats = o[:, :length], [jnp.swapaxes(x, 1, 2)[:, :length] for x in rows]
    if sinks is not None:
        o, stats = with_sinks(o, stats, sinks)
    return o, AttentionStats(*stats) if return_stats else None


def routed_attention(
    q: Array,
    k: Array,
    v: Array,
    active: Array,
    *,
    mask: Mask,
    segment_ids: Array | None,
    positions: Array | None,
    kv_segment_ids: Array | None,
    kv_positions: Array | None,
    scale: float,
    sinks: Array | None,
) -> Array:
    """See `plait.kernels.routed_attention`: each head's queries are gathered at its front, and tiles without one are not visited."""
    length, num_keys = q.shape[1], k.shape[1]
    own, tokens = sides(
        q, k, segment_ids=segment_ids, positions=positions, kv_segment_ids=kv_segment_ids, kv_positions=kv_positions
    )
    if own is tokens:
        own = tokens = renumbered(tokens)
    order = jnp.argsort(~active, axis=1, stable=True)  # [B, T, H]
    back = jnp.argsort(order, axis=1)
    gather = lambda x: jnp.take_along_axis(jnp.broadcast_to(x, active.shape), order, axis=1)
    segment_ids = gather(jnp.where(active, own.segment_ids[..., None], 0))
    queries = Tokens(segment_ids=segment_ids, positions=gather(own.positions[..., None]))
    queries = jax.tree.map(lambda x: jnp.swapaxes(_pad(x), 1, 2), queries)
    keys = jax.tree.map(lambda x: _pad(x)[:, None], tokens)
    gathered, k, v = (_pad(x) for x in (_permuted(q, order, back), k, v))
    problem = Problem(
        layout=Layout(mask=mask, num_queries=gathered.shape[1], num_keys=k.shape[1], own_keys=False, packed=True),
        num_keys=num_keys,
        tiles=choose_tiles(q.shape[-1], v.shape[-1], "softmax", False),
        scale=float(scale),
        sigmoid=False,
        stats=False,
    )
    o, (lse,) = _flash(problem, Operands(gathered, k, v, jnp.zeros(q.shape[2], jnp.float32), queries, keys))
    if sinks is not None:
        o, _ = with_sinks(o, [jnp.swapaxes(lse, 1, 2)], sinks)
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
def _flash(problem: Problem, x: Operands) -> tuple[Array, tuple[Array, ...]]:
    """`gpu_kernels.forward` with its gradients."""
    return gpu_kernels.forward(problem, x)


def _flash_forward(problem: Problem, x: Operands) -> Any:
    o, rows = gpu_kernels.forward(problem, x)
    return (o, rows), (x, o, rows)


def _flash_backward(problem: Problem, saved: Any, cotangents: tuple[Array, tuple[Array, ...]]) -> Any:
    x, o, rows = saved
    d_o, d_rows = cotangents
    delta = jnp.einsum("bthv,bthv->bht", d_o.astype(jnp.float32), o.astype(jnp.float32))
    read = gradient_rows(rows, d_rows, delta, sigmoid=problem.sigmoid)
    rows = gpu_gradients.in_units(rows, read, sigmoid=problem.sigmoid)
    d_q, d_bias = gpu_gradients.query_gradients(problem, x, d_o, rows)
    d_k, d_v = gpu_gradients.key_gradients(problem, x, d_o, rows)
    return (Operands(d_q, d_k, d_v, d_bias, None, None),)


_flash.defvjp(_flash_forward, _flash_backward)
