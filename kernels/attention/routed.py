"""Attention in which every head answers only the queries routed to it (Mixture-of-Head)."""

from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.attention import chunked, reference
from plait.kernels.context.attention import CONTEXT
from plait.kernels.dispatch import Implementation, Op, kernel
from plait.kernels.masks import Mask
from plait.kernels.shapes import check_divides, check_floating, check_rank, check_shape, check_tokens
from plait.kernels.sharding import Axes
from plait.kernels.tokens import Tokens

Array = jax.Array


def _masked(attention: Any) -> Any:
    """All heads answer all queries, and those not routed to a head are zeroed."""

    def run(q: Array, k: Array, v: Array, active: Array, **options: Any) -> Array:
        o, _ = attention(q, k, v, normalizer="softmax", sigmoid_bias=None, return_stats=False, block_table=None, **options)
        return jnp.where(active[..., None], o, 0)

    return run


_op = Op(
    "routed_attention",
    Axes(
        arguments=("bthk",),
        options={"segment_ids": "bt", "positions": "bt", "kv_segment_ids": "bt", "kv_positions": "bt", "sinks": "h"},
        results=("bthv",),
    ),
    CONTEXT,
    pallas_tpu=kernel("tpu", "plait.kernels.attention.pallas_tpu", "routed_attention", "routed_unsupported"),
    pallas_gpu=kernel("gpu", "plait.kernels.attention.pallas_gpu", "routed_attention", "routed_unsupported"),
    chunked=Implementation(_masked(chunked.attention)),
    reference=Implementation(_masked(reference.attention)),
)


def routed_attention(
    q: Array,
    k: Array,
    v: Array,
    active: Array,
    *,
    mask: Mask,
    at: Tokens | None = None,
    scale: float | None = None,
    sinks: Array | None = None,
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
      mask, at, scale, sinks, implementation: as in `attention`.

    Returns:
      o [B, T, H, V] in q's dtype.

    Raises:
      ValueError: a shape, ratio, dtype or known segment id does not fit, or the implementation is unknown.
      NotImplementedError: the named implementation does not support the call.

    Source: MoH, arXiv 2410.11842, which masks head outputs; skipping the queries is ours.
    """
    op = "routed_attention"
    check_rank(op, "q", q, "[B, T, H, K]")
    batch, length, num_heads, key_dim = q.shape
    check_rank(op, "k", k, "[B, T, Hkv, K]")
    check_shape(op, "k", k, (batch, length, k.shape[2], key_dim), "[B, T, Hkv, K] with B, T and K of q")
    check_rank(op, "v", v, "[B, T, Hkv, V]")
    check_shape(op, "v", v, (*k.shape[:3], v.shape[3]), "[B, T, Hkv, V] with B, T and Hkv of k")
    check_divides(op, "the number of k and v heads", k.shape[2], "the number of q heads", num_heads)
    check_floating(op, q=q, k=k, v=v)
    check_shape(op, "active", active, (batch, length, num_heads), "[B, T, H]")
    if active.dtype != bool:
        raise ValueError(f"{op}: active.dtype={active.dtype} must be bool; compare it with 0")
    check_tokens(op, "at", at, batch, length)
    if sinks is not None:
        check_shape(op, "sinks", sinks, (num_heads,), "[H]")
    scale = key_dim**-0.5 if scale is None else scale
    return _op(implementation, q, k, v, active, mask=mask, scale=scale, sinks=sinks, **reference.unpacked(at))
