"""Flash attention for TPU (Mosaic), forward and backward, with the statistics of each row inside.

Every tile is kept transposed, keys by queries [N, M]: then the maximum, the sums and the statistics of a query are sums over
sublanes, and what belongs to a query is a row [1, M] that broadcasts for nothing. Outputs of queries accumulate transposed too.
With z the scaled logits, one tile of the forward pass updates
  m' = max(m, max_j z_j), p_j = exp(z_j - m'), l <- e^(m-m') l + sum_j p_j, u <- e^(m-m') (u - (m' - m) l) + sum_j p_j (z_j - m')
and o likewise; then lse = m + log l and the entropy is log l - u / l. The kernels keep m unscaled, u in bits, and use powers of 2.
A tile is worked off in parts, which leaves the compiler room to run products and exponentials side by side; the statistics ride along.
The backward pass recomputes A; what it needs of each row is in `rows`.
Sink logits need no kernel: they scale a row's output by the share of its keys, which is done, and differentiated, outside.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.attention import tpu_kernels
from plait.kernels.attention.reference import MASKED as HIDDEN
from plait.kernels.attention.reference import AttentionStats, sides
from plait.kernels.attention.rows import first_mass, gradient_rows, with_sinks
from plait.kernels.attention.schedule import Layout, renumbered
from plait.kernels.attention.tpu_tiling import LANES, Operands, Problem, Tiles
from plait.kernels.masks import BlockTable, Mask
from plait.kernels.target import current, not_on
from plait.kernels.tokens import Tokens

Array = jax.Array

MIN_QUERIES = 32
"""Fewer queries than this (decoding) fill too little of a tile."""

MAX_HEAD_DIM = 256
MAX_TABLE = 1 << 17
"""Entries of a table in scalar memory (4 bytes each; the core has 1 MiB)."""


def choose_tiles(generation: str, key_dim: int, value_dim: int, dtype: Any) -> Tiles:
    """Tiles that compile within the scoped VMEM of a generation (v5e and v5p: 16 MiB)."""
    wide = max(key_dim, value_dim) > LANES or jnp.dtype(dtype).itemsize > 2
    size = 512 if wide else 1024
    return Tiles(block_q=size, block_kv=size, block_q_dq=size, block_kv_dq=size, block_q_dkv=size, block_kv_dkv=size)


def unsupported(
    q: Array, k: Array, v: Array, *, mask: Mask, scale: float, block_table: BlockTable | None = None, **_: object
) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    heads = 1 if block_table is None else block_table.visible.shape[1]
    return _unsupported(q, k, v, mask, scale, block_table, heads)


def routed_unsupported(q: Array, k: Array, v: Array, active: Array, *, mask: Mask, scale: float, **_: object) -> str | None:
    """Why this kernel cannot serve a call of `routed_attention`, or None."""
    return _unsupported(q, k, v, mask, scale, None, q.shape[2])


def _unsupported(
    q: Array, k: Array, v: Array, mask: Mask, scale: float, block_table: BlockTable | None, heads: int
) -> str | None:
    if reason := not_on("tpu"):
        return reason
    dtypes = {x.dtype.name for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        return f"q, k and v are {', '.join(sorted(dtypes))}, not all float32 or all bfloat16"
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return f"head dims {q.shape[-1]} and {v.shape[-1]} exceed {MAX_HEAD_DIM}"
    if q.shape[1] < MIN_QUERIES or k.shape[1] < MIN_QUERIES:
        return f"{q.shape[1]} queries and {k.shape[1]} keys fill no tile of at least {MIN_QUERIES}"
    if not isinstance(scale, (int, float)) or scale <= 0:
        return "the scale is not a number above 0"
    tiles = _tiles(q, k, v, mask, block_table)
    if block_table is not None:
        own = block_table.block_kv
        for size in (tiles.block_kv, tiles.block_kv_dq, tiles.block_kv_dkv):
            if (size % own and own % size) or size > 32 * own:
                return (
                    f"block_table.block_kv={own} is no multiple of a tile of {size} keys, nor a divisor of at least {size // 32}"
                )
    blocks = -(-q.shape[1] // tiles.block_q_dkv) * -(-k.shape[1] // tiles.block_kv_dkv)
    if blocks * q.shape[0] * heads > MAX_TABLE:
        return f"{q.shape[0]} x {heads} x {blocks} tiles exceed the {MAX_TABLE} that scalar memory holds"
    return None


def _tiles(q: Array, k: Array, v: Array, mask: Mask, table: BlockTable | None = None) -> Tiles:
    """The tiles of a call. Where blocks are hidden, none is larger than a block (of 128 at least), so that they are hidden tiles;
    a window of less than four tiles of keys gets smaller ones, which waste less at its ends."""
    here = current()
    generation = "v5e" if here is None else here.generation
    reach = mask.reach_back()
    most = 512 if reach is not None and reach < 4096 else 1024
    if mask.alignment > 1:
        most = min(most, max(LANES, mask.alignment))
    sizes = [most, most] if table is None else [min(most, max(LANES, x)) for x in (table.block_q, table.block_kv)]
    tiles = choose_tiles(generation, q.shape[-1], v.shape[-1], q.dtype)
    return tiles.fit(min(sizes[0], q.shape[1]), min(sizes[1], k.shape[1]))


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
    own_keys = kv_segment_ids is None and kv_positions is None
    packed = not own_keys or segment_ids is not None or positions is not None
    queries, keys = sides(
        q, k, segment_ids=segment_ids, positions=positions, kv_segment_ids=kv_segment_ids, kv_positions=kv_positions
    )
    if own_keys:
        queries = keys = renumbered(queries)
    if not packed:
        queries = keys = jax.tree.map(lambda x: x[:1], queries)
    problem = Problem(
        layout=Layout(mask=mask, num_queries=q.shape[1], num_keys=k.shape[1], own_keys=own_keys, packed=packed),
        tiles=_tiles(q, k, v, mask, block_table),
        scale=float(scale),
        sigmoid=normalizer == "sigmoid",
        stats=return_stats,
        table_blocks=None if block_table is None else (block_table.block_q, block_table.block_kv),
    )
    bias = jnp.broadcast_to(jnp.asarray(0 if sigmoid_bias is None else sigmoid_bias, jnp.float32), (q.shape[2],))
    table = None if block_table is None else block_table.visible
    q_side, k_side = jax.tree.map(lambda x: x[:, None], (queries, keys))
    q_heads, k_heads, v_heads = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    o, rows = _flash(problem, Operands(q_heads, k_heads, v_heads, bias, q_side, k_side, table))
    o, stats = jnp.moveaxis(o, 3, 1), [jnp.moveaxis(x, 2, 1) for x in rows]  # [B, H, V, T] and [B, H, T] to token-major
    if return_stats:
        where: dict[str, Any] = {"own_keys": own_keys, "mask": mask, "block_table": block_table, "scale": float(scale)}
        sigmoid = bias if problem.sigmoid else None
        stats.append(first_mass(q, k, stats[0], queries, keys, sigmoid_bias=sigmoid, **where))
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
    own, tokens = sides(
        q, k, segment_ids=segment_ids, positions=positions, kv_segment_ids=kv_segment_ids, kv_positions=kv_positions
    )
    if own is tokens:
        own = tokens = renumbered(tokens)
    active = jnp.swapaxes(active, 1, 2)  # [B, H, T]
    order = jnp.argsort(~active, axis=-1, stable=True)
    back = jnp.argsort(order, axis=-1)
    gather = lambda x: jnp.take_along_axis(jnp.broadcast_to(x, active.shape), order, axis=-1)
    segment_ids = gather(jnp.where(active, own.segment_ids[:, None], 0))
    queries = Tokens(segment_ids=segment_ids, positions=gather(own.positions[:, None]))
    problem = Problem(
        layout=Layout(mask=mask, num_queries=q.shape[1], num_keys=k.shape[1], own_keys=False, packed=True),
        tiles=_tiles(q, k, v, mask),
        scale=float(scale),
        sigmoid=False,
        stats=False,
    )
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    bias = jnp.zeros(q.shape[1], jnp.float32)
    keys = jax.tree.map(lambda x: x[:, None], tokens)
    o, (lse,) = _flash(problem, Operands(_permuted(q, order, back), k, v, bias, queries, keys))
    if sinks is not None:
        o = (o * jax.nn.sigmoid(lse - sinks.astype(jnp.float32).reshape(1, -1, 1))[:, :, None]).astype(o.dtype)
    return jnp.swapaxes(_permuted(jnp.swapaxes(o, 2, 3), back, order), 1, 2)


def column_mass_unsupported(q: Array, k: Array, lse: Array, *, mask: Mask, scale: float, **_: object) -> str | None:
    """Why this kernel cannot serve a call of `column_mass`, or None."""
    return _unsupported(q, k, k, mask, scale, None, 1)


def column_mass(
    q: Array, k: Array, lse: Array, *, mask: Mask, segment_ids: Array | None, positions: Array | None, scale: float
) -> Array:
    """See `plait.kernels.column_mass`."""
    packed = segment_ids is not None or positions is not None
    tokens = renumbered(sides(q, k, segment_ids=segment_ids, positions=positions, kv_segment_ids=None, kv_positions=None)[0])
    side = jax.tree.map(lambda x: x[: None if packed else 1, None], tokens)
    layout = Layout(mask=mask, num_queries=q.shape[1], num_keys=k.shape[1], own_keys=True, packed=packed)
    problem = Problem(layout=layout, tiles=_tiles(q, k, k, mask), scale=float(scale), sigmoid=False, stats=False)
    bias = jnp.zeros(q.shape[2], jnp.float32)
    lse = jnp.swapaxes(jnp.where(lse > HIDDEN / 2, lse, -HIDDEN), 1, 2)
    mass = tpu_kernels.column_mass(problem, Operands(jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2), None, bias, side, side), lse)
    return jnp.swapaxes(mass, 1, 2)


@jax.custom_vjp
def _permuted(x: Array, order: Array, back: Array) -> Array:
    """x [B, H, T, K] with the tokens of each head in `order` [B, H, T], whose inverse is `back`."""
    return jnp.take_along_axis(x, order[..., None], axis=2)


_permuted.defvjp(
    lambda x, order, back: (_permuted(x, order, back), (order, back)),
    lambda saved, d_x: (_permuted(d_x, saved[1], saved[0]), None, None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(problem: Problem, x: Operands) -> tuple[Array, tuple[Array, ...]]:
    """`tpu_kernels.forward` with its gradients."""
    return tpu_kernels.forward(problem, x)


def _flash_forward(problem: Problem, x: Operands) -> Any:
    o, rows = tpu_kernels.forward(problem, x)
    return (o, rows), (x, o, rows)


def _flash_backward(problem: Problem, saved: Any, cotangents: tuple[Array, tuple[Array, ...]]) -> Any:
    x, o, rows = saved
    d_o, d_rows = cotangents
    delta = jnp.sum(d_o.astype(jnp.float32) * o, axis=2)
    rows = gradient_rows(rows, d_rows, delta, sigmoid=problem.sigmoid)
    d_o = jnp.swapaxes(d_o, 2, 3)
    d_q, d_bias = tpu_kernels.query_gradients(problem, x, d_o, rows)
    d_k, d_v = tpu_kernels.key_gradients(problem, x, d_o, rows)
    return (Operands(d_q, d_k, d_v, d_bias, None, None, None),)


_flash.defvjp(_flash_forward, _flash_backward)
