"""Linear attention with a decay a head (RetNet, Lightning, Mamba-2) or a key channel (GLA, HGRN2)."""

from typing import Any

import jax

from plait.kernels.context.recurrence import DECAY
from plait.kernels.decay import chunked, reference
from plait.kernels.decay.implied import decay_rows
from plait.kernels.dispatch import Implementation, Op, kernel
from plait.kernels.recurrence import RecurrenceCall, asked_for, over_weights, with_ones
from plait.kernels.shapes import accumulation_dtype
from plait.kernels.tokens import Tokens

__all__ = ["decay", "decay_rows"]

Array = jax.Array

_op = Op(
    "decay",
    DECAY,
    pallas_tpu=kernel("tpu", "plait.kernels.decay.pallas_tpu", "decay"),
    pallas_gpu=kernel("gpu", "plait.kernels.decay.pallas_gpu", "decay"),
    chunked=Implementation(chunked.decay),
    reference=Implementation(reference.decay),
)


def decay(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    *,
    scale: float | None = None,
    initial_state: Array | None = None,
    at: Tokens | None = None,
    normalize: bool = False,
    chunk_size: int = 64,
    return_stats: bool = False,
    implementation: str = "auto",
) -> tuple[Any, ...]:
    """The outputs and the final state of linear attention whose state decays, by head or by key channel.

    S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T,    o_t = scale S_t^T q_t.

    Args:
      q: [B, T, Hqk, K], float32 or bfloat16.
      k: [B, T, Hqk, K].
      v: [B, T, Hv, V]; Hqk divides Hv, and value head h uses q and k of head h // (Hv / Hqk).
      g: float32 log decay, at most 0: [B, T, Hv] for one a head, [B, T, Hv, K] for one a channel.
      scale: multiplies q; None is K^-1/2.
      initial_state: [B, Hv, K, V] float32, of the first token's segment; None is zero.
      at: what is known of the tokens; the state is zero at the start of each segment but the first, and padding gives zeros and is
        skipped. None is one segment.
      normalize: divides by the summed weights as Based and Hedgehog do: o_t = S_t^T q_t / (z_t^T q_t + 1e-12), z_t being the sum
        of the keys, decayed as the state; `scale` then means nothing. For q and k from a positive feature map. The states get a
        last column for z_t: [B, Hv, K, V + 1].
      chunk_size: tokens per chunk of the chunked form, a power of two; kernels have their own.
      return_stats: adds a third result.
      implementation: "auto", "pallas_tpu", "pallas_gpu", "chunked" or "reference".

    Returns:
      o [B, T, Hv, V] in q's dtype, the state [B, Hv, K, V] float32 after the last token that is not padding, and with `return_stats`
      a `RecurrenceStats` by spans of 128 tokens, through which no gradient flows.

    Raises:
      ValueError: a shape, ratio or known segment id does not fit, or the implementation is unknown.
      NotImplementedError: the named implementation does not support the call.

    Source: by head, Transformers are SSMs (Mamba-2), arXiv 2405.21060, section 6; a fixed g gives RetNet (2307.08621) and Lightning
    attention (2401.04658). By channel, Gated Linear Attention, 2312.06635, equation 3; its secondary chunking of section 4.3 is taken
    down to single tokens.
    """
    call = RecurrenceCall.of(
        "decay",
        q=q.astype(accumulation_dtype(q)) if normalize else q,
        k=k,
        v=with_ones(v) if normalize else v,
        g=g,
        scale=1.0 if normalize else scale,
        initial_state=initial_state,
        at=at,
        chunk_size=chunk_size,
        return_stats=return_stats,
    )
    o, *others = asked_for(*_op(implementation, call))
    return (over_weights(o).astype(q.dtype) if normalize else o, *others)
