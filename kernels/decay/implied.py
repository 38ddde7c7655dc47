"""The implied attention of a recurrence that decays and adds."""

from typing import Any

import jax

from plait.kernels.context.rows import CONTEXT
from plait.kernels.dispatch import in_parts
from plait.kernels.recurrence import ROWS, by_channel, cut, implied_rows
from plait.kernels.shapes import check_recurrence
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
    v = jax.ShapeDtypeStruct((*g.shape[:3], 1), k.dtype)
    check_recurrence(
        "decay_rows",
        q,
        k,
        v,
        {"g": (g, ("[B, T, Hv]", "[B, T, Hv, K]"))},
        initial_state=None,
        at=at,
        chunk_size=chunk_size,
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    segment_ids = None if at is None else at.segment_ids
    return in_parts(ROWS, CONTEXT, _rows)(rows, q, k, g, scale=scale, segment_ids=segment_ids, chunk_size=chunk_size)[0]


def _rows(rows: Array, q: Array, k: Array, g: Array, *, reader: Array | None = None, **options: Any) -> tuple[Array, Array]:
    chunks = cut(q, k, None, by_channel(g), num_heads=g.shape[2], **options)
    return implied_rows(chunks, rows, q.shape[1], reader=reader)
