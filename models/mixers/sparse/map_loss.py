"""How far a map of attention over columns is from attention itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels import Tokens, attention_rows
from plait.models.mixers.sparse.columns import column_of, seen_by, starts

KL_SHARE = 0.1
"""What the divergence counts beside the squared error."""
BLOCK_SIZE = 32
"""Queries whose attention is made at a time."""
_NOTHING = -1e30


def map_loss(scores: jax.Array, q: jax.Array, k: jax.Array, *, at: Tokens, **options: Any) -> jax.Array:
    """The mean over tokens and heads of `0.1 KL(p || e) + mean_j (p_j - e_j)^2`, a scalar, of the dtype of `scores`.

    Args:
      scores: `[B, T, H, K]` float32, of columns; `e_j` is the softmax over the tokens j that a query sees of the scores of their columns.
      q: `[B, T, H, C]`; p is the attention of these queries and keys, `[B, T, Hkv, C]`, which have no gradient by it.
      options: those of `attention_rows`.

    Source: SEA (2310.01777), section 3 and the authors' attention.py.
    """
    at = at.placed(*q.shape[:2])
    dtype, width, seen = jnp.promote_types(scores.dtype, jnp.float32), scores.shape[-1], seen_by(at.positions)
    mass, surprise, squares = _summed(*jax.lax.stop_gradient((q, k)), width, at, options)
    sizes = jnp.diff(starts(seen, width), axis=-1)[:, :, None].astype(dtype)  # [B, T, 1, K]
    weighed = jnp.where(sizes > 0, scores.astype(dtype) + jnp.log(jnp.maximum(sizes, 1)), _NOTHING)
    log_e = scores.astype(dtype) - jax.nn.logsumexp(weighed, axis=-1, keepdims=True)
    e = jnp.where(sizes > 0, jnp.exp(jnp.where(sizes > 0, log_e, 0)), 0)
    divergence = surprise - (mass * log_e).sum(-1)
    squared = squares + (sizes * jnp.square(e) - 2 * mass * e).sum(-1)
    rows = KL_SHARE * divergence + squared / seen[:, :, None].astype(dtype)
    real = (at.segment_ids > 0).astype(dtype)
    return (rows.mean(-1) * real).sum() / jnp.maximum(real.sum(), 1)


def _summed(
    q: jax.Array, k: jax.Array, width: int, at: Tokens, options: dict[str, Any]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of attention p: its sum under each column `[B, T, H, K]`, and `sum_j p_j log p_j` and `sum_j p_j^2` `[B, T, H]`."""
    length = q.shape[1]
    block = min(length, BLOCK_SIZE)

    def some(rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        p = attention_rows(q, k, rows=rows, at=at, **options)
        p = jnp.moveaxis(p, 1, 2)  # [B, R, H, S]
        column = column_of(at.positions[:, None, :], seen_by(at.positions)[:, rows, None], width)
        mass = jnp.einsum("brhs,brsk->brhk", p, jax.nn.one_hot(column, width, dtype=p.dtype), precision="highest")
        return mass, jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum(-1), jnp.square(p).sum(-1)

    rows = jnp.minimum(jnp.arange(-(-length // block) * block), length - 1).reshape(-1, block)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]
    return jax.tree.map(join, jax.lax.map(some, rows))
