"""The implied attention of the delta rule."""

import jax
import jax.numpy as jnp

from plait.kernels import chunking
from plait.kernels.context.implied import CONTEXT
from plait.kernels.delta_rule import chunked
from plait.kernels.dispatch import in_parts
from plait.kernels.recurrence import RowsCall, implied_rows
from plait.kernels.tokens import Tokens

Array = jax.Array


def delta_rule_rows(
    q: Array,
    k: Array,
    g: Array | None,
    beta: Array,
    rows: Array,
    *,
    scale: float | None = None,
    l2_norm_eps: float | None = None,
    at: Tokens | None = None,
    chunk_size: int = 64,
) -> Array:
    """Rows of the implied attention: A with `o[:, rows] = A @ v` for `plait.kernels.delta_rule` from a zero initial state.

    Weights may be negative: a later key erases what an earlier one wrote. Costs O(R T K) and the chunk inverses.

    Args:
      q: [B, T, Hqk, K].
      k: [B, T, Hqk, K].
      g: [B, T, Hv] or [B, T, Hv, K] float32 log decay, at most 0, or None.
      beta: [B, T, Hv], in [0, 2].
      rows: int32 [R] token indices, may be traced.
      scale: multiplies q; None is K^-1/2.
      l2_norm_eps: as in `plait.kernels.delta_rule`.
      at: what is known of the tokens; None is one segment.
      chunk_size: tokens per chunk, a power of two.

    Returns:
      [B, Hv, R, T] float32, zero above the diagonal and across segments.

    Raises:
      ValueError: a shape does not fit.
    """
    call = RowsCall.of(
        "delta_rule_rows", q=q, k=k, g=g, beta=beta, rows=rows, scale=scale, l2_norm_eps=l2_norm_eps, at=at, chunk_size=chunk_size
    )
    return in_parts(CONTEXT, _rows)(call)[0]


def _rows(call: RowsCall) -> tuple[Array, Array]:
    call = call.normalized()
    chunks, _, lower, beta = chunked.cut(call)
    return implied_rows(chunks, call, inverse=chunking.unit_lower_inverse(lower) * jnp.swapaxes(beta, -1, -2))
