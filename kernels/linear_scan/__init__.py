"""A state that decays and adds, channel by channel (HGRN, RG-LRU)."""

import jax

from plait.kernels.context.recurrence import CHANNELS
from plait.kernels.dispatch import Implementation, Op
from plait.kernels.linear_scan import chunked, reference
from plait.kernels.linear_scan.call import LinearScanCall
from plait.kernels.shapes import check_chunk_size, check_floating, check_log_decay, check_rank, check_shape, check_tokens
from plait.kernels.tokens import Tokens

__all__ = ["linear_scan"]

Array = jax.Array

_op = Op("linear_scan", CHANNELS, chunked=Implementation(chunked.linear_scan), reference=Implementation(reference.linear_scan))


def linear_scan(
    x: Array,
    g: Array,
    *,
    initial_state: Array | None = None,
    at: Tokens | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """The states of channels that decay and add, and the last of them: `h_t = exp(g_t) h_{t-1} + x_t`.

    Args:
      x: [B, T, C], float32 or bfloat16.
      g: [B, T, C] float32 log decay, at most 0.
      initial_state: [B, C] float32, of the first token's segment; None is zero.
      at: what is known of the tokens; the state is zero at the start of each segment but the first, and padding gives zeros and is
        skipped. None is one segment.
      chunk_size: tokens per chunk of the chunked form, a power of two.
      implementation: "auto", "chunked" or "reference".

    Returns:
      h [B, T, C] in x's dtype, and the state [B, C] float32 after the last token that is not padding.

    Raises:
      ValueError: a shape, an option or a known segment id or log decay does not fit, or the implementation is unknown.

    Source: Hierarchically Gated Recurrent Neural Network, arXiv 2311.04823, equation 4; Griffin, 2402.19427, equation 4.
    """
    check_rank("linear_scan", "x", x, "[B, T, C]")
    check_floating("linear_scan", x=x, g=g)
    check_shape("linear_scan", "g", g, x.shape, "[B, T, C] as x")
    check_log_decay("linear_scan", g)
    check_tokens("linear_scan", "at", at, *x.shape[:2])
    check_chunk_size("linear_scan", chunk_size)
    if initial_state is not None:
        check_shape("linear_scan", "initial_state", initial_state, (x.shape[0], x.shape[2]), "[B, C]")
    call = LinearScanCall(
        x=x,
        g=g,
        initial_state=initial_state,
        segment_ids=None if at is None else at.segment_ids,
        chunk_size=chunk_size,
    )
    return _op(implementation, call)
