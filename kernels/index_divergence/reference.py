"""The divergence as written: all scores and all weights of all queries."""

import jax
import jax.numpy as jnp

from plait.kernels.attention.call import AttentionCall
from plait.kernels.attention.reference import MASKED, normalized_weights, relative_weights, visible_pairs
from plait.kernels.index_divergence.call import DivergenceCall
from plait.kernels.shapes import accumulation_dtype

Array = jax.Array


def index_divergence(call: DivergenceCall) -> Array:
    """See `plait.kernels.index_divergence`."""
    wide = call.replace(q=call.q.astype(accumulation_dtype(call.q)), k=call.k.astype(accumulation_dtype(call.k)))
    return divergence(wide, "highest")


def divergence(call: DivergenceCall, precision: jax.lax.PrecisionLike) -> Array:
    """The rows [B, T] of the call's queries; `precision` is of the products."""
    attention = AttentionCall(q=call.q, k=call.k, mask=call.mask, scale=call.scale, selected=call.selected)
    visible = visible_pairs(attention, call.at, call.kv_at)[:, 0, 0]  # [B, T, S]
    target = _weights(attention, call, precision).sum((1, 2)) / call.q.shape[2]
    log_share = jax.nn.log_softmax(jnp.where(visible, scores(call, precision), MASKED), axis=-1)
    some = visible & (target > 0)
    return jnp.where(some, target * (jnp.log(jnp.where(some, target, 1)) - log_share), 0).sum(-1)


def _weights(attention: AttentionCall, call: DivergenceCall, precision: jax.lax.PrecisionLike) -> Array:
    """Attention's, [B, Hkv, R, T, S]."""
    if call.lse is not None:
        return normalized_weights(attention, call.lse, call.at, call.kv_at, precision)
    p, factor, _ = relative_weights(attention, call.at, call.kv_at, precision)
    return p * factor


def scores(call: DivergenceCall, precision: jax.lax.PrecisionLike) -> Array:
    """The indexer's scores [B, T, S] in the accumulation dtype, of products of index_q's."""
    dtype = accumulation_dtype(call.index_q, call.index_k)
    k = call.index_k.astype(call.index_q.dtype)
    z = jnp.einsum("bthk,bsk->bths", call.index_q, k, precision=precision, preferred_element_type=dtype)
    return jnp.sum(call.weights.astype(dtype)[..., None] * jax.nn.relu(z), axis=2)
