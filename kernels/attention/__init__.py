"""Softmax and sigmoid attention under one mask object."""

from typing import Literal

import jax

from plait.kernels.attention import chunked, reference
from plait.kernels.attention.implied import attention_rows
from plait.kernels.attention.reference import AttentionStats, unpacked
from plait.kernels.context.attention import CONTEXT
from plait.kernels.dispatch import Implementation, Op, kernel
from plait.kernels.masks import BlockTable, Mask
from plait.kernels.shapes import check_divides, check_floating, check_rank, check_shape, check_tokens
from plait.kernels.sharding import Axes
from plait.kernels.tokens import Tokens

__all__ = ["AttentionStats", "attention", "attention_rows"]

Array = jax.Array

_FOLDER = "plait.kernels.attention"
_AXES = Axes(
    arguments=("bthk",),
    options={
        "segment_ids": "bt",
        "positions": "bt",
        "kv_segment_ids": "bt",
        "kv_positions": "bt",
        "block_table": "bhqk",
        "sinks": "h",
        "sigmoid_bias": "h",
    },
    results=("bthv", "bth"),
)

_op = Op(
    "attention",
    _AXES,
    CONTEXT,
    pallas_tpu=kernel("tpu", f"{_FOLDER}.pallas_tpu", "attention"),
    cudnn=kernel("gpu", f"{_FOLDER}.cudnn", "attention"),
    pallas_gpu=kernel("gpu", f"{_FOLDER}.pallas_gpu", "attention"),
    chunked=Implementation(chunked.attention),
    reference=Implementation(reference.attention),
)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask,
    at: Tokens | None = None,
    kv_at: Tokens | None = None,
    block_table: BlockTable | None = None,
    scale: float | None = None,
    sinks: Array | None = None,
    normalizer: Literal["softmax", "sigmoid"] = "softmax",
    sigmoid_bias: Array | float | None = None,
    return_stats: bool = False,
    implementation: str = "auto",
) -> Array | tuple[Array, AttentionStats]:
    """Each query's weighted mean of the values it may see, and on request what its row of weights looked like.

    A_ij = exp(z_ij) / (exp(sink_h) + sum_j exp(z_ij)),    z_ij = scale q_i . k_j,    o_i = sum_j A_ij v_j,
    over the keys j that the mask shows to i, the sink term only with `sinks`; with the sigmoid, A_ij = sigmoid(z_ij + bias_h).
    A query that sees nothing gives zeros.

    Args:
      q: [B, T, H, K], float32 or bfloat16.
      k: [B, S, Hkv, K]; Hkv divides H, and head h uses k and v of head h // (H / Hkv).
      v: [B, S, Hkv, V].
      mask: which positions a query sees in its segment.
      at: what is known of the tokens; those of one segment see each other. None is one segment from position 0.
      kv_at: of the keys, where they are not the queries' own tokens, such as a cache; segment id 0 is an empty entry. The order of
        the entries does not matter then, only their positions.
      block_table: blocks of keys that each block of queries may see, intersected with the mask (block top-k selection).
      scale: multiplies the logits; None is K^-1/2.
      sinks: [H] logits that join the denominator only; softmax only.
      normalizer: "softmax" or "sigmoid".
      sigmoid_bias: scalar or [H], added to the sigmoid's logits; usually -log of the longest training sequence.
      return_stats: also return `AttentionStats`, differentiable except for `max_logit` ties.
      implementation: "auto", "pallas_tpu", "cudnn", "pallas_gpu", "chunked" or "reference".

    Returns:
      o [B, T, H, V] in q's dtype; with `return_stats`, (o, AttentionStats).

    Raises:
      ValueError: a shape, ratio, option or known segment id does not fit, or the implementation is unknown.
      NotImplementedError: the named implementation does not support the call.

    Source: scaled dot-product attention; grouped heads of arXiv 2305.13245; sink logits as in gpt-oss (2508.10925); sigmoid of
    2409.04431. Entropy is log(l) - u / l with l = sum_j exp(z_j - m) and u = sum_j exp(z_j - m) (z_j - m).
    """
    _check_arrays(q, k, v, at=at, kv_at=kv_at)
    _check_table(q, k, block_table)
    _check_normalizer(q, sinks=sinks, normalizer=normalizer, sigmoid_bias=sigmoid_bias)
    o, stats = _op(
        implementation,
        q,
        k,
        v,
        mask=mask,
        **unpacked(at, kv_at),
        block_table=block_table,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        sinks=sinks,
        normalizer=normalizer,
        sigmoid_bias=sigmoid_bias,
        return_stats=return_stats,
    )
    return (o, stats) if return_stats else o


def _check_arrays(q: Array, k: Array, v: Array, *, at: Tokens | None, kv_at: Tokens | None) -> None:
    op = "attention"
    check_rank(op, "q", q, "[B, T, H, K]")
    check_rank(op, "k", k, "[B, S, Hkv, K]")
    check_rank(op, "v", v, "[B, S, Hkv, V]")
    check_floating(op, q=q, k=k, v=v)
    batch, length, num_heads, key_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    check_shape(op, "k", k, (batch, num_keys, num_kv_heads, key_dim), "[B, S, Hkv, K] with B and K of q")
    check_shape(op, "v", v, (batch, num_keys, num_kv_heads, v.shape[3]), "[B, S, Hkv, V] with B, S and Hkv of k")
    check_divides(op, "the number of k and v heads", num_kv_heads, "the number of q heads", num_heads)
    check_tokens(op, "at", at, batch, length)
    check_tokens(op, "kv_at", kv_at, batch, num_keys, in_order=False)
    if kv_at is None and num_keys != length:
        raise ValueError(
            f"{op}: k has S={num_keys} tokens and q has T={length}; they must be equal unless kv_at says what the keys are; pass it"
        )


def _check_table(q: Array, k: Array, table: BlockTable | None) -> None:
    if table is None:
        return
    for name, size in (("block_q", table.block_q), ("block_kv", table.block_kv)):
        if size < 1:
            raise ValueError(f"attention: block_table.{name}={size} must be at least 1; use 64 or 128")
    visible, heads = table.visible, q.shape[2]
    check_rank("attention", "block_table.visible", visible, "[B, H, NQ, NK]")
    if visible.dtype != bool:
        raise ValueError(f"attention: block_table.visible.dtype={visible.dtype} must be bool; compare it with 0")
    count = (-(-q.shape[1] // table.block_q), -(-k.shape[1] // table.block_kv))
    expected = (q.shape[0], 1 if visible.shape[1] == 1 else heads, *count)
    check_shape("attention", "block_table.visible", visible, expected, "[B, H or 1, ceil(T / block_q), ceil(S / block_kv)]")


def _check_normalizer(q: Array, *, sinks: Array | None, normalizer: str, sigmoid_bias: Array | float | None) -> None:
    op, num_heads = "attention", q.shape[2]
    if sinks is not None:
        check_shape(op, "sinks", sinks, (num_heads,), "[H]")
    if normalizer not in ("softmax", "sigmoid"):
        raise ValueError(f"{op}: normalizer={normalizer!r} is unknown; use 'softmax' or 'sigmoid'")
    if (normalizer == "sigmoid") != (sigmoid_bias is not None):
        raise ValueError(
            f"{op}: sigmoid_bias={sigmoid_bias} with normalizer={normalizer!r}; the sigmoid needs one and softmax takes none; "
            "use -log(longest training sequence) or None"
        )
    if normalizer == "sigmoid" and sinks is not None:
        raise ValueError(f"{op}: sinks with normalizer='sigmoid' have no denominator to join; use sinks=None")
