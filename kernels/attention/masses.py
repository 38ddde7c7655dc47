"""Where attention goes, from a row's log-normaliser: weights on a segment's first tokens, and what each key receives."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from plait.kernels.attention import rows
from plait.kernels.attention.reference import MASKED as HIDDEN
from plait.kernels.attention.reference import grouped_heads, scaled_logits, sides, unpacked
from plait.kernels.dispatch import Implementation, Op, kernel
from plait.kernels.masks import BlockTable, Mask
from plait.kernels.shapes import accumulation_dtype, check_floating, check_rank, check_shape, matmul_precision
from plait.kernels.sharding import Axes
from plait.kernels.tokens import Tokens

Array = jax.Array

MAX_TILE = 1 << 22
"""Weights a head that exist at a time in the chunked form."""


def first_masses(
    q: Array,
    k: Array,
    lse: Array,
    *,
    mask: Mask,
    first_k: int = 4,
    at: Tokens | None = None,
    kv_at: Tokens | None = None,
    block_table: BlockTable | None = None,
    scale: float | None = None,
    normalizer: Literal["softmax", "sigmoid"] = "softmax",
    sigmoid_bias: Array | float | None = None,
) -> Array:
    """The weights of every query on the first tokens of its segment; `first_k` scores a query, and no pass over the keys.

    Args:
      q: [B, T, H, K].
      k: [B, S, Hkv, K].
      lse: [B, T, H], as `attention` returns it with `return_stats` for the same arguments.
      first_k: how many leading positions, at least 1.
      mask, at, kv_at, block_table, scale, normalizer, sigmoid_bias: as in `attention`.

    Returns:
      [B, T, H, first_k] float32, 0 where a query does not see the token; for the sigmoid, shares of the row sum. Differentiable.

    Raises:
      ValueError: a shape does not fit, or first_k is below 1.
    """
    _check("first_masses", q, k, lse)
    if first_k < 1:
        raise ValueError(f"first_masses: first_k={first_k} must be at least 1; use 1 for the first token alone")
    own_keys = kv_at is None
    queries, keys = sides(q, k, **unpacked(at, kv_at))
    bias = None if normalizer == "softmax" else jnp.broadcast_to(jnp.asarray(sigmoid_bias, jnp.float32), (q.shape[2],))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    where: dict[str, Any] = {"own_keys": own_keys, "mask": mask, "block_table": block_table, "scale": scale, "sigmoid_bias": bias}
    return jnp.stack([rows.first_mass(q, k, lse, queries, keys, position=p, **where) for p in range(first_k)], axis=-1)


def column_mass(
    q: Array,
    k: Array,
    lse: Array,
    *,
    mask: Mask,
    at: Tokens | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> Array:
    """What each key receives: the sum of its softmax weights over all queries. Half the products of a forward pass, no gradient.

    Args:
      q: [B, T, H, K], float32 or bfloat16.
      k: [B, T, Hkv, K].
      lse: [B, T, H], as `attention` returns it with `return_stats` for the same arguments; sink logits are in it where there are any.
      mask, at, scale: as in `attention`.
      implementation: "auto", "pallas_tpu", "chunked" or "reference".

    Returns:
      [B, T, H] float32: sum_i A_ij of key j. Over the keys of a segment it sums to the segment's queries (less their sinks' shares).

    Raises:
      ValueError: a shape does not fit, or the implementation is unknown.
      NotImplementedError: the named implementation does not support the call.
    """
    _check("column_mass", q, k, lse)
    q, k, lse = jax.lax.stop_gradient((q, k, lse))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    at = Tokens() if at is None else at
    return _op(implementation, q, k, lse, mask=mask, segment_ids=at.segment_ids, positions=at.positions, scale=scale)


def _reference(
    q: Array, k: Array, lse: Array, *, mask: Mask, segment_ids: Array | None, positions: Array | None, scale: float
) -> Array:
    """All weights at once."""
    tokens, _ = sides(q, k, segment_ids=segment_ids, positions=positions, kv_segment_ids=None, kv_positions=None)
    dtype = accumulation_dtype(q, k)
    logits = scaled_logits(q.astype(dtype), k.astype(dtype), scale, "highest")  # [B, Hkv, R, T, T]
    visible = mask.dense(tokens.positions, tokens.positions, tokens.segment_ids, tokens.segment_ids)[:, None, None]
    lse = grouped_heads(jnp.swapaxes(lse, 1, 2), k.shape[2])[..., None]
    mass = jnp.where(visible, jnp.exp(jnp.where(visible, logits - lse, 0)), 0).sum(3)
    return jnp.swapaxes(mass.reshape(q.shape[0], -1, q.shape[1]), 1, 2)


def _chunked(
    q: Array, k: Array, lse: Array, *, mask: Mask, segment_ids: Array | None, positions: Array | None, scale: float
) -> Array:
    """Some queries at a time."""
    tokens, _ = sides(q, k, segment_ids=segment_ids, positions=positions, kv_segment_ids=None, kv_positions=None)
    length = q.shape[1]
    block = max(1, min(length, MAX_TILE // length))
    padding = -length % block

    def cut(x: Array) -> Array:  # [B, T, ...] to [N, B, block, ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

    def add(total: Array, part: tuple[Array, Array, Tokens]) -> tuple[Array, None]:
        q, lse, queries = part
        logits = scaled_logits(q, k, scale, matmul_precision(q.dtype))  # [B, Hkv, R, block, S]
        visible = mask.dense(queries.positions, tokens.positions, queries.segment_ids, tokens.segment_ids)[:, None, None]
        lse = grouped_heads(jnp.swapaxes(lse, 1, 2), k.shape[2])[..., None]
        visible &= lse > HIDDEN / 2
        return total + jnp.where(visible, jnp.exp(jnp.where(visible, logits - lse, 0)), 0).sum(3), None

    shape = (q.shape[0], k.shape[2], q.shape[2] // k.shape[2], length)
    total, _ = jax.lax.scan(add, jnp.zeros(shape, accumulation_dtype(q, k)), (cut(q), cut(lse), jax.tree.map(cut, tokens)))
    return jnp.swapaxes(total.reshape(shape[0], -1, length), 1, 2)


def _check(op: str, q: Array, k: Array, lse: Array) -> None:
    check_rank(op, "q", q, "[B, T, H, K]")
    check_rank(op, "k", k, "[B, S, Hkv, K]")
    check_shape(op, "lse", lse, q.shape[:3], "[B, T, H] of q")
    check_floating(op, q=q, k=k, lse=lse)


_op = Op(
    "column_mass",
    Axes(arguments=("bthk", "bthk", "bth"), options={"segment_ids": "bt", "positions": "bt"}, results=("bth",)),
    pallas_tpu=kernel("tpu", "plait.kernels.attention.pallas_tpu", "column_mass", "column_mass_unsupported"),
    chunked=Implementation(_chunked),
    reference=Implementation(_reference),
)
