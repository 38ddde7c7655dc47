"""How far the scores of a lightning indexer are from the weights of the attention that it chooses for: what the indexer learns by."""

from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.context.index_divergence import CONTEXT
from plait.kernels.dispatch import Implementation, Op, kernel
from plait.kernels.index_divergence import chunked, reference
from plait.kernels.index_divergence.call import DivergenceCall
from plait.kernels.masks import Mask, SelectedBlocks
from plait.kernels.shapes import check_divides, check_floating, check_rank, check_shape, check_tokens, resolved_scale
from plait.kernels.tokens import Tokens

__all__ = ["divergence_served_by_kernel", "index_divergence"]

Array = jax.Array

_op = Op(
    "index_divergence",
    CONTEXT,
    pallas_tpu=kernel("tpu", "plait.kernels.index_divergence.pallas_tpu", "index_divergence"),
    chunked=Implementation(chunked.index_divergence),
    reference=Implementation(reference.index_divergence),
)


@jax.named_scope("index_divergence")
def index_divergence(
    index_q: Array,
    index_k: Array,
    weights: Array,
    q: Array,
    k: Array,
    *,
    mask: Mask,
    selected: SelectedBlocks | None = None,
    scale: float | None = None,
    lse: Array | None = None,
    at: Tokens | None = None,
    implementation: str = "auto",
) -> Array:
    """`KL(p_i || softmax_s(I_is))` of each query, in nats, over the keys that it sees.

    `I_is = sum_h weights_ih relu(index_q_ih . index_k_s)`, and `p_i` is the mean over heads of the attention's weights, which sums to one:
    those of the selected keys alone where there is a selection. Differentiable in index_q, index_k and weights; the attention is the
    target, and has no gradient from here, nor has `lse`.

    Args:
      index_q: [B, T, I, C], float32 or bfloat16.
      index_k: [B, T, C].
      weights: [B, T, I].
      q: [B, T, H, K], the attention's queries.
      k: [B, T, Hkv, K], its keys; Hkv divides H.
      mask: what a query can see.
      selected: what of it it does see, one choice for all heads; None is all.
      scale: of the attention's logits; None is K^-1/2.
      lse: [B, T, H] float32, natural log of sum_s exp(scale q_ih . k_s) over the keys that the query sees, as `attention` of the same
        q, k and options returns it with `return_lse`: without sink logits, soft cap and bias, which are no part of p. Then nothing is
        normalised again. None: it is made here.
      at: what is known of the tokens. None is one segment.
      implementation: "auto", "pallas_tpu", "chunked" or "reference".

    Returns:
      [B, T], float32; 0 where a query sees nothing.

    Raises:
      ValueError: a shape, dtype or known segment id does not fit, or the implementation is unknown.
      NotImplementedError: the named implementation does not support the call.

    Source: DeepSeek-V3.2, arXiv 2512.02556, equations 1, 3 and 4.
    """
    call = _call(index_q, index_k, weights, q, k, mask=mask, selected=selected, scale=scale, lse=lse, at=at)
    return _op(implementation, call)


def divergence_served_by_kernel(index_q: Array, index_k: Array, weights: Array, q: Array, k: Array, **options: Any) -> bool:
    """Whether `index_divergence` of these arguments would run in a kernel of the accelerator at hand, or of the target."""
    return _op.served_by_kernel(_call(index_q, index_k, weights, q, k, **options))


def _call(
    index_q: Array,
    index_k: Array,
    weights: Array,
    q: Array,
    k: Array,
    *,
    mask: Mask,
    selected: SelectedBlocks | None = None,
    scale: float | None = None,
    lse: Array | None = None,
    at: Tokens | None = None,
) -> DivergenceCall:
    """The call, checked."""
    op = "index_divergence"
    check_rank(op, "index_q", index_q, "[B, T, I, C]")
    check_rank(op, "q", q, "[B, T, H, K]")
    check_rank(op, "k", k, "[B, T, Hkv, K]")
    check_floating(op, index_q=index_q, index_k=index_k, weights=weights, q=q, k=k)
    batch, length = q.shape[:2]
    check_shape(op, "index_q", index_q, (batch, length, *index_q.shape[2:]), "[B, T, I, C] with B and T of q")
    check_shape(op, "index_k", index_k, (batch, length, index_q.shape[3]), "[B, T, C] with C of index_q")
    check_shape(op, "weights", weights, index_q.shape[:3], "[B, T, I] of index_q")
    check_shape(op, "k", k, (batch, length, k.shape[2], q.shape[3]), "[B, T, Hkv, K] with B, T and K of q")
    check_divides(op, "the number of k heads", k.shape[2], "the number of q heads", q.shape[2])
    check_tokens(op, "at", at, batch, length)
    if selected is not None:
        check_shape(
            op,
            "selected.indices",
            selected.indices,
            (batch, length, 1, *selected.indices.shape[3:]),
            "[B, T, 1, N], one choice for all heads",
        )
    if lse is not None:
        check_shape(op, "lse", lse, q.shape[:3], "[B, T, H] of q")
        if lse.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"{op}: lse.dtype={lse.dtype} must be float32; pass what attention returns with return_lse, as it is"
            )
    q, k, selected, lse = jax.lax.stop_gradient((q, k, selected, lse))
    places = (at or Tokens()).placed(batch, length)
    places = Tokens(segment_ids=places.segment_ids, positions=places.positions)
    scale = resolved_scale(op, scale, q.shape[3])
    return DivergenceCall(
        index_q=index_q,
        index_k=index_k,
        weights=weights,
        q=q,
        k=k,
        at=places,
        kv_at=places,
        selected=selected,
        lse=lse,
        mask=mask,
        scale=scale,
    )
