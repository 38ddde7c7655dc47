"""Softmax and sigmoid attention under one mask object."""

from typing import Any, Literal

import jax

from plait.kernels.attention import chunked, reference
from plait.kernels.attention.bias import Bias, DistanceBias, LowRankBias
from plait.kernels.attention.by_head import each_mask
from plait.kernels.attention.call import AttentionCall
from plait.kernels.attention.implied import attention_rows
from plait.kernels.attention.reference import AttentionStats
from plait.kernels.context.attention import CONTEXT
from plait.kernels.dispatch import Implementation, Op, kernel
from plait.kernels.masks import HeadMasks, Mask, SelectedBlocks
from plait.kernels.tokens import Tokens

__all__ = ["AttentionStats", "Bias", "DistanceBias", "LowRankBias", "attention", "attention_rows", "served_by_kernel"]

Array = jax.Array

_FOLDER = "plait.kernels.attention"
_op = Op(
    "attention",
    CONTEXT,
    pallas_tpu=kernel("tpu", f"{_FOLDER}.pallas_tpu", "attention"),
    pallas_gpu=kernel("gpu", f"{_FOLDER}.pallas_gpu", "attention"),
    chunked=Implementation(chunked.attention),
    reference=Implementation(reference.attention),
)


@each_mask()
def attention(
    q: Array,
    k: Array,
    v: Array | None = None,
    *,
    mask: Mask | HeadMasks,
    value_dim: int | None = None,
    at: Tokens | None = None,
    kv_at: Tokens | None = None,
    selected: SelectedBlocks | None = None,
    scale: float | None = None,
    sinks: Array | None = None,
    normalizer: Literal["softmax", "sigmoid"] = "softmax",
    sigmoid_bias: Array | float | None = None,
    logit_soft_cap: float | None = None,
    bias: Bias | None = None,
    return_stats: bool = False,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Array | tuple[Array, AttentionStats | Array]:
    """Each query's weighted mean of the values it may see, and on request what its row of weights looked like.

    A_ij = exp(z_ij) / (exp(sink_h) + sum_j exp(z_ij)),    z_ij = cap(scale q_i . k_j + bias_ij),    o_i = sum_j A_ij v_j,
    cap(z) = c tanh(z / c) if there is one, over the keys j that the mask shows to i, the sink term only with `sinks`; with the sigmoid,
    A_ij = sigmoid(z_ij + sigmoid_bias_h). A query that sees nothing gives zeros.

    Args:
      q: [B, T, H, K], float32 or bfloat16.
      k: [B, S, Hkv, K]; Hkv divides H, and head h uses k and v of head h // (H / Hkv).
      v: [B, S, Hkv, V], or None with `value_dim`.
      mask: which positions a query sees in its segment; `HeadMasks` where that differs by head.
      value_dim: V where the values are the first V channels of k (latent attention), so that a kernel reads them once.
      at: what is known of the tokens; those of one segment see each other. None is one segment from position 0.
      kv_at: of the keys, where they are not the queries' own tokens, such as a cache; segment id 0 is an empty entry. The order of
        the entries does not matter then, only their positions.
      selected: blocks of its document that each query sees, intersected with the mask; see `topk_blocks`.
      scale: multiplies the logits; None is K^-1/2.
      sinks: logits that join the denominator only, [H] or, of each query, [B, T, H]; softmax only.
      normalizer: "softmax" or "sigmoid".
      sigmoid_bias: scalar or [H], added to the sigmoid's logits; usually -log of the longest training sequence.
      logit_soft_cap: c, above 0, or None; sink logits and the sigmoid's bias are not capped.
      bias: added to the scaled logits: `LowRankBias`, which says what it costs, or `DistanceBias`.
      return_stats: also return `AttentionStats`, all differentiable. Where several keys tie for `max_logit`, the first of them has its
        gradient in the reference and the chunked form, and each of them the whole of it in kernels and across a ring's devices.
      return_lse: of the statistics of a softmax return lse alone, which costs nothing more.
      implementation: "auto", "pallas_tpu", "pallas_gpu", "chunked" or "reference".

    Returns:
      o [B, T, H, V] in q's dtype; with `return_stats`, (o, AttentionStats); with `return_lse`, (o, lse [B, T, H] float32).

    Raises:
      ValueError: a shape, ratio, option or known segment id does not fit, or the implementation is unknown.
      NotImplementedError: the named implementation does not support the call.

    Source: scaled dot-product attention; grouped heads of arXiv 2305.13245; sink logits as in gpt-oss (2508.10925); sigmoid of
    2409.04431; soft cap of Gemma 2 (2408.00118). Entropy is log(l) - u / l with l = sum_j exp(z_j - m) and u = sum_j exp(z_j - m) (z_j - m).
    """
    if v is None and value_dim is None:
        raise ValueError("attention: v=None leaves nothing to attend to; pass v, or value_dim for values in the channels of k")
    call = AttentionCall.of(
        "attention",
        q=q,
        k=k,
        v=v,
        value_dim=value_dim,
        mask=mask,
        at=at,
        kv_at=kv_at,
        selected=selected,
        scale=scale,
        sinks=sinks,
        normalizer=normalizer,
        sigmoid_bias=sigmoid_bias,
        logit_soft_cap=logit_soft_cap,
        bias=bias,
        return_stats=return_stats,
        return_lse=return_lse,
    )
    o, stats = _op(implementation, call)
    if return_lse:
        return o, stats.lse
    return (o, stats) if return_stats else o


def served_by_kernel(q: Array, k: Array, v: Array | None = None, **options: Any) -> bool:
    """Whether `attention` of these arguments would run in a kernel of the accelerator at hand, or of the target."""
    return _op.served_by_kernel(AttentionCall.of("attention", q=q, k=k, v=v, **options))
