"""The delta rule: erase what a key holds, then write (DeltaNet, Gated DeltaNet, KDA)."""

from typing import Any

import jax

from plait.kernels.context.recurrence import DELTA_RULE
from plait.kernels.delta_rule import chunked, reference
from plait.kernels.delta_rule.implied import delta_rule_rows
from plait.kernels.dispatch import Implementation, Op, kernel
from plait.kernels.recurrence import RecurrenceCall, asked_for
from plait.kernels.tokens import Tokens

__all__ = ["delta_rule", "delta_rule_rows"]

Array = jax.Array

_op = Op(
    "delta_rule",
    DELTA_RULE,
    pallas_tpu=kernel("tpu", "plait.kernels.delta_rule.pallas_tpu", "delta_rule"),
    pallas_gpu=kernel("gpu", "plait.kernels.delta_rule.pallas_gpu", "delta_rule"),
    chunked=Implementation(chunked.delta_rule),
    reference=Implementation(reference.delta_rule),
)


def delta_rule(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    beta: Array,
    *,
    scale: float | None = None,
    l2_norm_eps: float | None = None,
    initial_state: Array | None = None,
    at: Tokens | None = None,
    chunk_size: int = 64,
    return_stats: bool = False,
    implementation: str = "auto",
) -> tuple[Any, ...]:
    """The outputs and the final state of a state that is decayed, corrected towards v_t at k_t, and read.

    R_t = Diag(exp g_t) S_{t-1},    S_t = R_t + beta_t k_t (v_t - R_t^T k_t)^T,    o_t = scale S_t^T q_t.

    Args:
      q: [B, T, Hqk, K], float32 or bfloat16, already normalised without `l2_norm_eps`.
      k: [B, T, Hqk, K], likewise: with |k| <= 1 and beta <= 2 no step enlarges the state, with longer keys it diverges.
      v: [B, T, Hv, V]; Hqk divides Hv, and value head h uses q and k of head h // (Hv / Hqk).
      g: float32 log decay, at most 0: [B, T, Hv] for one decay a head (Gated DeltaNet), [B, T, Hv, K] for one a channel (KDA),
        None for no decay (DeltaNet).
      beta: [B, T, Hv], write strength in [0, 2], after its sigmoid.
      scale: multiplies q; None is K^-1/2.
      l2_norm_eps: q and k are divided by sqrt(sum x^2 + eps), on TPU inside the kernel, which spares passes over them; None takes them
        as they are.
      initial_state: [B, Hv, K, V] float32, of the first token's segment; None is zero.
      at: what is known of the tokens; the state is zero at the start of each segment but the first, and padding gives zeros and is
        skipped. None is one segment.
      chunk_size: tokens per chunk of the chunked form, a power of two; kernels have their own.
      return_stats: adds a third result.
      implementation: "auto", "pallas_tpu", "pallas_gpu", "chunked" or "reference".

    Returns:
      o [B, T, Hv, V] in q's dtype, the state [B, Hv, K, V] float32 after the last token that is not padding, and with `return_stats`
      a `RecurrenceStats` by spans of 128 tokens, through which no gradient flows.

    Raises:
      ValueError: a shape, ratio or known segment id does not fit, or the implementation is unknown.
      NotImplementedError: the named implementation does not support the call.

    Source: DeltaNet, arXiv 2406.06484, section 3; Gated DeltaNet, 2412.06464, equation 10; Kimi Linear (KDA), 2510.26692,
    equation 1.
    """
    call = RecurrenceCall.of(
        "delta_rule",
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=scale,
        l2_norm_eps=l2_norm_eps,
        initial_state=initial_state,
        at=at,
        chunk_size=chunk_size,
        return_stats=return_stats,
    )
    return asked_for(*_op(implementation, call))
