"""Rows of the attention matrix."""

from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.attention.by_head import each_mask
from plait.kernels.attention.call import AttentionCall
from plait.kernels.attention.reference import attention_weights

Array = jax.Array


@each_mask(axis=1)
def attention_rows(q: Array, k: Array, rows: Array, **options: Any) -> Array:
    """Rows of the attention matrix: A with `o[:, rows] = A @ v` for `plait.kernels.attention`. Costs O(R S K).

    Args:
      q: [B, T, H, K].
      k: [B, S, Hkv, K].
      rows: int32 [R] query indices, may be traced.
      options: those of `attention` but `return_stats` and `implementation`; `mask` is needed.

    Returns:
      [B, H, R, S] float32, zero at keys a query does not see.

    Raises:
      ValueError: a shape, ratio, option or known segment id does not fit.
    """
    call = AttentionCall.of("attention_rows", q=q, k=k, **options)
    queries, keys = call.sides
    chosen = lambda x: x[:, rows]
    weights, _ = attention_weights(call.on_queries(chosen), jax.tree.map(chosen, queries), keys)
    return weights.reshape(q.shape[0], q.shape[2], rows.shape[0], k.shape[1]).astype(jnp.float32)
