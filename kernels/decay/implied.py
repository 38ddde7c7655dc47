"""The implied attention of a recurrence that decays and adds."""

import jax

from plait.kernels.context.implied import CONTEXT
from plait.kernels.dispatch import in_parts
from plait.kernels.recurrence import RowsCall, cut, implied_rows
from plait.kernels.tokens import Tokens

Array = jax.Array


def decay_rows(
    q: Array,
    k: Array,
    g: Array,
    rows: Array,
    *,
    scale: float | None = None,
    at: Tokens | None = None,
    chunk_size: int = 64,
) -> Array:
    """Rows of the implied attention: A with `o[:, rows] = A @ v` for `plait.kernels.decay` from a zero initial state.

    A_ij = scale sum_d q_id k_jd exp(g_{j+1} + ... + g_i) for j <= i in the same segment, else 0. Costs O(R T K).

    Args:
      q: [B, T, Hqk, K].
      k: [B, T, Hqk, K].
      g: [B, T, Hv] or [B, T, Hv, K] float32 log decay, at most 0.
      rows: int32 [R] token indices, may be traced.
      scale: multiplies q; None is K^-1/2.
      at: what is known of the tokens; None is one segment.
      chunk_size: tokens per chunk, a power of two.

    Returns:
      [B, Hv, R, T] float32.

    Raises:
      ValueError: a shape does not fit.
    """
    call = RowsCall.of("decay_rows", q=q, k=k, g=g, rows=rows, scale=scale, at=at, chunk_size=chunk_size)
    return in_parts(CONTEXT, _rows)(call)[0]


def _rows(call: RowsCall) -> tuple[Array, Array]:
    return implied_rows(cut(call), call)
