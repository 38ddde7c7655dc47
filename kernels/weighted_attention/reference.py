"""Attention by a rule as written: all weights at once."""

from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.shapes import accumulation_dtype
from plait.kernels.weighted_attention.call import WeightedCall
from plait.kernels.weighted_attention.rule import Seen

Array = jax.Array


def weighted_attention(call: WeightedCall) -> Array:
    """See `plait.kernels.weighted_attention`."""
    dtype = accumulation_dtype(call.q, call.k)
    exact = call.replace(q=call.q.astype(dtype), k=call.k.astype(dtype), v=call.v.astype(dtype))
    return weighed(exact, "highest").astype(call.q.dtype)


def weights(call: WeightedCall, precision: Any) -> Array:
    """The weights [B, H, T, S] of the call's queries on its keys."""
    queries, keys = call.queries, call.keys
    visible = call.mask.dense(queries.positions, keys.positions, queries.segment_ids, keys.segment_ids)[:, None]
    return call.rule(call.q, call.k, call.parameters, Seen(visible, queries, keys, precision))


def weighed(call: WeightedCall, precision: Any) -> Array:
    """The values [B, T, H, V] as the call's weights sum them."""
    a, v = weights(call, precision), call.v
    grouped = a.reshape(a.shape[0], v.shape[2], -1, *a.shape[2:])
    o = jnp.einsum("bgnrs,bsgv->brgnv", grouped, v, precision=precision, preferred_element_type=a.dtype)
    return o.reshape(*o.shape[:2], -1, o.shape[-1])
