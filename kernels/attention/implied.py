"""Rows of the attention matrix."""

from typing import Literal

import jax
import jax.numpy as jnp

from plait.kernels.attention.reference import attention_weights, grouped_heads, sides, unpacked
from plait.kernels.masks import BlockTable, Mask
from plait.kernels.tokens import Tokens

Array = jax.Array


def attention_rows(
    q: Array,
    k: Array,
    rows: Array,
    *,
    mask: Mask,
    at: Tokens | None = None,
    kv_at: Tokens | None = None,
    block_table: BlockTable | None = None,
    scale: float | None = None,
    sinks: Array | None = None,
    normalizer: Literal["softmax", "sigmoid"] = "softmax",
    sigmoid_bias: Array | float | None = None,
) -> Array:
    """Rows of the attention matrix: A with `o[:, rows] = A @ v` for `plait.kernels.attention`. Costs O(R S K).

    Args:
      q: [B, T, H, K].
      k: [B, S, Hkv, K].
      rows: int32 [R] query indices, may be traced.
      mask, at, kv_at, block_table, scale, sinks, normalizer, sigmoid_bias: as in `attention`.

    Returns:
      [B, H, R, S] float32, zero at keys a query does not see.
    """
    queries, keys = sides(q, k, **unpacked(at, kv_at))
    weights, _ = attention_weights(
        q[:, rows],
        k,
        jax.tree.map(lambda x: x[:, rows], queries),
        keys,
        mask=mask,
        shown=None if block_table is None else grouped_heads(block_table.at(rows, jnp.arange(k.shape[1])[None, :]), k.shape[2]),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        sinks=sinks,
        normalizer=normalizer,
        sigmoid_bias=sigmoid_bias,
        return_stats=False,
    )
    return weights.reshape(q.shape[0], q.shape[2], rows.shape[0], k.shape[1]).astype(jnp.float32)
