"""Causal depthwise convolution over a few tokens."""

from typing import Literal

import jax

from plait.kernels.context.short_conv import CONTEXT
from plait.kernels.dispatch import Implementation, Op, kernel
from plait.kernels.shapes import check_rank, check_shape, check_tokens
from plait.kernels.short_conv import chunked, reference
from plait.kernels.short_conv.call import ShortConvCall
from plait.kernels.tokens import Tokens

__all__ = ["short_conv"]

Array = jax.Array

_op = Op(
    "short_conv",
    CONTEXT,
    pallas_tpu=kernel("tpu", f"{__name__}.pallas_tpu", "short_conv"),
    chunked=Implementation(chunked.short_conv),
    reference=Implementation(reference.short_conv),
)


def short_conv(
    x: Array,
    weight: Array,
    *,
    bias: Array | None = None,
    activation: Literal["silu"] | None = "silu",
    initial_state: Array | None = None,
    at: Tokens | None = None,
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """Each channel convolved with the W last tokens of its segment, and the inputs that the next token will need.

    y_t = activation(sum_w weight_w x_{t - (W-1) + w} + bias).

    Args:
      x: [B, T, D], float32 or bfloat16.
      weight: [W, D]; the last row meets the current token.
      bias: [D] or None.
      activation: "silu" or None.
      initial_state: [B, W-1, D], the inputs before the first token, in its segment; None is zero.
      at: what is known of the tokens; no tap crosses into another segment. Padding gives zeros, and where a tap falls on it, it is one.
        None is one segment.
      implementation: "auto", "pallas_tpu", "chunked" or "reference".

    Returns:
      y [B, T, D] in x's dtype, and the last W-1 inputs [B, W-1, D] in x's dtype, up to the last token that is not padding, zero
      where its segment has fewer.

    Raises:
      ValueError: a shape, the activation or a known segment id does not fit, or the implementation is unknown.
      NotImplementedError: the named implementation does not support the call.

    Source: Mamba, arXiv 2312.00752, section 3.4 (kernel 4, SiLU); the segments are ours.
    """
    check_rank("short_conv", "x", x, "[B, T, D]")
    check_rank("short_conv", "weight", weight, "[W, D]")
    batch, length, d_model = x.shape
    width = weight.shape[0]
    check_shape("short_conv", "weight", weight, (width, d_model), "[W, D] with D of x")
    if bias is not None:
        check_shape("short_conv", "bias", bias, (d_model,), "[D]")
    if initial_state is not None:
        check_shape("short_conv", "initial_state", initial_state, (batch, width - 1, d_model), "[B, W-1, D]")
    if activation not in ("silu", None):
        raise ValueError(f"short_conv: activation={activation!r} is unknown; use 'silu' or None")
    check_tokens("short_conv", "at", at, batch, length)
    call = ShortConvCall(
        x=x,
        weight=weight,
        bias=bias,
        initial_state=initial_state,
        segment_ids=None if at is None else at.segment_ids,
        activation=activation,
    )
    return _op(implementation, call)
