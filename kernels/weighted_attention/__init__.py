"""Attention whose weights are no softmax or sigmoid of a scaled dot product: a rule gives them."""

from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.dispatch import Implementation, Op
from plait.kernels.masks import Mask
from plait.kernels.tokens import Tokens
from plait.kernels.weighted_attention import chunked, reference
from plait.kernels.weighted_attention.call import WeightedCall
from plait.kernels.weighted_attention.rule import Rule, Seen, dot_products, over_sum, softmax

__all__ = ["Rule", "Seen", "dot_products", "over_sum", "softmax", "weighted_attention", "weighted_rows"]

Array = jax.Array

_op = Op(
    "weighted_attention",
    chunked=Implementation(chunked.weighted_attention),
    reference=Implementation(reference.weighted_attention),
)


def weighted_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    rule: Rule,
    parameters: Any = None,
    mask: Mask,
    at: Tokens | None = None,
    kv_at: Tokens | None = None,
    before: tuple[Array, Tokens] | None = None,
    implementation: str = "auto",
) -> Array:
    """The values, summed with the weights that a rule gives to a query and all keys.

    A = rule(q, k),    o_i = sum_j A_ij v_j over the keys j that the mask shows to i.

    Rows are made by blocks of queries and made again in the backward pass: memory grows with T.

    Args:
      q: [B, T, H, ...], float32 or bfloat16; what the rule reads of a query.
      k: [B, S, Hkv, ...]; Hkv divides H.
      v: [B, S, Hkv, V]; head h uses v of head h // (H / Hkv).
      rule: see `Rule`.
      parameters: the arrays that the rule has besides, a pytree.
      mask: which positions a query sees in its segment.
      at: what is known of the tokens. None is one segment from position 0.
      kv_at: of the keys, where they are not the queries' own tokens, such as a cache; segment id 0 is an empty entry.
      before: the `rule.halo` queries before the first, [B, halo, H, ...], and what is known of them; None is padding.
      implementation: "auto", "chunked" or "reference".

    Returns:
      o [B, T, H, V] in q's dtype.

    Raises:
      ValueError: a shape, ratio or known segment id does not fit, or the implementation is unknown.
    """
    call = WeightedCall.of(
        "weighted_attention", q=q, k=k, v=v, rule=rule, parameters=parameters, mask=mask, at=at, kv_at=kv_at, before=before
    )
    return _op(implementation, call)


def weighted_rows(
    q: Array, k: Array, rows: Array, *, rule: Rule, parameters: Any = None, mask: Mask, at: Tokens | None = None
) -> Array:
    """Rows of the weights: A with `o[:, rows] = A @ v` for `weighted_attention`.

    Args:
      q, k, rule, parameters, mask, at: as there.
      rows: int32 [R] query indices, may be traced.

    Returns:
      [B, H, R, S] float32, zero at keys a query does not see.
    """
    call = WeightedCall.of(
        "weighted_rows", q=q, k=k, v=None, rule=rule, parameters=parameters, mask=mask, at=at, kv_at=None, before=None
    )

    def row(index: Array) -> Array:
        near = call.on_queries(lambda x: jax.lax.dynamic_slice_in_dim(x, index, rule.halo + 1, axis=1))
        return reference.weights(near, "highest")[:, :, 0]

    return jnp.moveaxis(jax.vmap(row)(rows), 0, 2).astype(jnp.float32)
