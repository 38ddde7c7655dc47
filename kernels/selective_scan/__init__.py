"""States of several numbers a channel, each with a decay of its own (Mamba-1, and Mega's moving average)."""

import jax

from plait.kernels.context.recurrence import CHANNELS
from plait.kernels.dispatch import Implementation, Op
from plait.kernels.selective_scan import chunked, reference
from plait.kernels.selective_scan.call import SelectiveScanCall
from plait.kernels.shapes import check_chunk_size, check_floating, check_log_decay, check_rank, check_shape, check_tokens
from plait.kernels.tokens import Tokens

__all__ = ["selective_scan"]

Array = jax.Array

_op = Op(
    "selective_scan",
    CHANNELS,
    chunked=Implementation(chunked.selective_scan),
    reference=Implementation(reference.selective_scan),
)


def selective_scan(
    x: Array,
    dt: Array | None,
    A: Array,
    B: Array | None,
    C: Array,
    *,
    initial_state: Array | None = None,
    at: Tokens | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """What channels with a state of N numbers read of it, and the last state.

    s_tnd = exp(dt_td A_nd) s_{t-1,nd} + dt_td x_td B_tn,    y_td = sum_n C_tn s_tnd.

    Args:
      x: [B, T, D], float32 or bfloat16.
      dt: [B, T, D] float32, at least 0: the step; None is a step of 1.
      A: [N, D] float32, at most 0.
      B: [B, T, N], or None for ones.
      C: [B, T, N], or [N, D] for the same of all tokens, by channel.
      initial_state: [B, N, D] float32, of the first token's segment; None is zero.
      at: what is known of the tokens; the state is zero at the start of each segment but the first, and padding gives zeros and is
        skipped. None is one segment.
      chunk_size: tokens per chunk of the chunked form, a power of two.
      implementation: "auto", "chunked" or "reference".

    Returns:
      y [B, T, D] in x's dtype, and the state [B, N, D] float32 after the last token that is not padding.

    Raises:
      ValueError: a shape, an option or a known segment id or A does not fit, or the implementation is unknown.

    Source: Mamba, arXiv 2312.00752, algorithm 2 (B discretised as dt B, as in its code); with dt and B of 1 and a fixed C the moving average
    of Mega, 2209.10655, equation 6.
    """
    op = "selective_scan"
    check_rank(op, "x", x, "[B, T, D]")
    check_rank(op, "A", A, "[N, D]")
    (batch, length, width), num_states = x.shape, A.shape[0]
    fixed = C.ndim == 2
    check_shape(op, "A", A, (num_states, width), "[N, D] with D of x")
    if dt is not None:
        check_shape(op, "dt", dt, x.shape, "[B, T, D] as x")
    if B is not None:
        check_shape(op, "B", B, (batch, length, num_states), "[B, T, N]")
    if fixed:
        check_shape(op, "C", C, (num_states, width), "[N, D]")
    else:
        check_shape(op, "C", C, (batch, length, num_states), "[B, T, N] or [N, D]")
    if initial_state is not None:
        check_shape(op, "initial_state", initial_state, (batch, num_states, width), "[B, N, D]")
    check_floating(op, x=x, A=A)
    check_log_decay(op, A)
    check_tokens(op, "at", at, batch, length)
    check_chunk_size(op, chunk_size)
    call = SelectiveScanCall(
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=None if fixed else C,
        fixed_C=C if fixed else None,
        initial_state=initial_state,
        segment_ids=None if at is None else at.segment_ids,
        chunk_size=chunk_size,
    )
    return _op(implementation, call)
