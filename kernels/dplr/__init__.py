"""A state whose transition is a diagonal plus a matrix of rank one (RWKV-7)."""

from typing import Any

import jax

from plait.kernels.context.recurrence import DELTA_RULE
from plait.kernels.dispatch import Implementation, Op
from plait.kernels.dplr import chunked, reference
from plait.kernels.dplr.call import DPLRCall
from plait.kernels.dplr.implied import dplr_rows
from plait.kernels.recurrence import asked_for
from plait.kernels.tokens import Tokens

__all__ = ["dplr", "dplr_rows"]

Array = jax.Array

_op = Op("dplr", DELTA_RULE, chunked=Implementation(chunked.dplr), reference=Implementation(reference.dplr))


def dplr(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    a: Array,
    b: Array,
    *,
    scale: float | None = None,
    initial_state: Array | None = None,
    at: Tokens | None = None,
    chunk_size: int = 64,
    return_stats: bool = False,
    implementation: str = "auto",
) -> tuple[Any, ...]:
    """The outputs and the final state of a state that decays by channel and moves what it holds along `a` to `b`.

    S_t = (Diag(exp g_t) + b_t a_t^T) S_{t-1} + k_t v_t^T,    o_t = scale S_t^T q_t.

    `a` reads the state before it decays. With a = -exp(g) k, b = beta k and beta k for k it is the delta rule.

    Args:
      q: [B, T, Hqk, K], float32 or bfloat16; RWKV's receptance.
      k: [B, T, Hqk, K].
      v: [B, T, Hv, V]; Hqk divides Hv, and value head h uses q, k, a and b of head h // (Hv / Hqk).
      g: [B, T, Hv, K] float32 log decay, at most 0.
      a: [B, T, Hqk, K].
      b: [B, T, Hqk, K]; a state stays bounded where the transition does, as for a = -n, b = r n with |n| <= 1 and r in [0, 1].
      scale: multiplies q; None is K^-1/2.
      initial_state: [B, Hv, K, V] float32, of the first token's segment; None is zero.
      at: what is known of the tokens; the state is zero at the start of each segment but the first, and padding gives zeros and is
        skipped. None is one segment.
      chunk_size: tokens per chunk of the chunked form, a power of two.
      return_stats: adds a third result.
      implementation: "auto", "chunked" or "reference".

    Returns:
      o [B, T, Hv, V] in q's dtype, the state [B, Hv, K, V] float32 after the last token that is not padding, and with `return_stats`
      a `RecurrenceStats` by spans of 128 tokens, whose writes are k v^T, through which no gradient flows.

    Raises:
      ValueError: a shape, ratio or known segment id does not fit, or the implementation is unknown.

    Source: RWKV-7 "Goose", arXiv 2503.14456, equation 17.
    """
    call = DPLRCall.of(
        "dplr",
        q=q,
        k=k,
        v=v,
        g=g,
        a=a,
        b=b,
        scale=scale,
        initial_state=initial_state,
        at=at,
        chunk_size=chunk_size,
        return_stats=return_stats,
    )
    return asked_for(*_op(implementation, call))
