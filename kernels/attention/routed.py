"""Attention in which every head answers only the queries routed to it (Mixture-of-Head)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.attention import chunked, reference
from plait.kernels.attention.bias import Bias
from plait.kernels.attention.by_head import each_mask
from plait.kernels.attention.call import AttentionCall, RoutedCall
from plait.kernels.context.attention import CONTEXT
from plait.kernels.dispatch import Implementation, Op, kernel
from plait.kernels.masks import HeadMasks, Mask
from plait.kernels.tokens import Tokens

Array = jax.Array


def _masked(attention: Callable[[AttentionCall], tuple[Array, Any]]) -> Implementation:
    """All heads answer all queries, and those not routed to a head are zeroed."""
    return Implementation(lambda call: jnp.where(call.active[..., None], attention(call)[0], 0))


_op = Op(
    "routed_attention",
    CONTEXT,
    pallas_tpu=kernel("tpu", "plait.kernels.attention.pallas_tpu", "routed_attention", "routed_unsupported"),
    pallas_gpu=kernel("gpu", "plait.kernels.attention.pallas_gpu", "routed_attention"),
    chunked=_masked(chunked.attention),
    reference=_masked(reference.attention),
)


@each_mask()
def routed_attention(
    q: Array,
    k: Array,
    v: Array,
    active: Array,
    *,
    mask: Mask | HeadMasks,
    at: Tokens | None = None,
    scale: float | None = None,
    sinks: Array | None = None,
    logit_soft_cap: float | None = None,
    bias: Bias | None = None,
    implementation: str = "auto",
) -> Array:
    """`attention` in which head h answers only the queries that `active` routes to it; the others get zeros.

    The kernels gather the queries of each head and visit no tile without one, so that time follows the share of active pairs. No
    query is dropped, whatever the balance. The chunked and the reference form compute all pairs.

    Args:
      q: [B, T, H, K], float32 or bfloat16.
      k: [B, T, Hkv, K]; Hkv divides H.
      v: [B, T, Hkv, V].
      active: bool [B, T, H].
      mask, at, scale, sinks, logit_soft_cap, bias, implementation: as in `attention`; sinks [H] only.

    Returns:
      o [B, T, H, V] in q's dtype.

    Raises:
      ValueError: a shape, ratio, dtype or known segment id does not fit, or the implementation is unknown.
      NotImplementedError: the named implementation does not support the call.

    Source: MoH, arXiv 2410.11842, which masks head outputs; skipping the queries is ours.
    """
    call = RoutedCall.of(
        "routed_attention",
        q=q,
        k=k,
        v=v,
        active=active,
        mask=mask,
        at=at,
        scale=scale,
        sinks=sinks,
        logit_soft_cap=logit_soft_cap,
        bias=bias,
    )
    return _op(implementation, call)
