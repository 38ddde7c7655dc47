"""The implied attention of the delta rule."""

from typing import Any

import jax

from plait.kernels.context.rows import CONTEXT
from plait.kernels.delta_rule import chunked
from plait.kernels.dispatch import in_parts
from plait.kernels.recurrence import ROWS, implied_rows
from plait.kernels.shapes import check_recurrence
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
      at: what is known of the tokens; None is one segment.
      chunk_size: tokens per chunk, a power of two.

    Returns:
      [B, Hv, R, T] float32, zero above the diagonal and across segments.

    Raises:
      ValueError: a shape does not fit.
    """
    v = jax.ShapeDtypeStruct((*beta.shape[:3], 1), k.dtype)
    gates = {"g": (g, ("[B, T, Hv]", "[B, T, Hv, K]")), "beta": (beta, ("[B, T, Hv]",))}
    check_recurrence("delta_rule_rows", q, k, v, gates, initial_state=None, at=at, chunk_size=chunk_size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    segment_ids = None if at is None else at.segment_ids
    return in_parts(ROWS, CONTEXT, _rows)(rows, q, k, g, beta, scale=scale, segment_ids=segment_ids, chunk_size=chunk_size)[0]


def _rows(
    rows: Array, q: Array, k: Array, g: Array | None, beta: Array, *, reader: Array | None = None, **options: Any
) -> tuple[Array, Array]:
    chunks, _, inverse = chunked.cut(q, k, None, g, beta, **options)
    return implied_rows(chunks, rows, q.shape[1], inverse=inverse, reader=reader)
