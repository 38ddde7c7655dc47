"""Local linear attention as written: all weights, and a solve a query."""

import jax
import jax.numpy as jnp

from plait.kernels.attention.reference import apply, attention_weights
from plait.kernels.chunking import dot
from plait.kernels.local_linear.call import LocalLinearCall
from plait.kernels.tokens import Tokens

Array = jax.Array


def local_linear(call: LocalLinearCall) -> Array:
    """See `plait.kernels.local_linear`."""
    return outputs(call, *call.sides)


def outputs(call: LocalLinearCall, queries: Tokens, keys: Tokens) -> Array:
    """The outputs [B, T, H, V] of the call's queries, which are at `queries`, over all keys."""
    found = weights(call, queries, keys)
    return apply(found, call.v.astype(found.dtype), "highest").astype(call.q.dtype)


def weights(call: LocalLinearCall, queries: Tokens, keys: Tokens) -> Array:
    """A [B, Hkv, R, T, S]; everything is float32, whatever came."""
    p, _ = attention_weights(call, queries, keys, None)
    k = call.k.astype(p.dtype)
    probe = solve(call, p, k) if call.probe is None else _grouped(call, call.probe)
    tilt = dot("bgrtk,bsgk->bgrts", probe, k)
    return p * (1 + jnp.sum(p * tilt, axis=-1, keepdims=True) - tilt)


def solve(call: LocalLinearCall, p: Array, k: Array) -> Array:
    """r [B, Hkv, R, T, K] of weights p [B, Hkv, R, T, S] and keys k."""
    mean = dot("bgrts,bsgk->bgrtk", p, k)
    # The second moments come a channel at a time, so that nothing of S x K x K exists.
    moments = jax.lax.map(lambda channel: dot("bgrts,bsgk->bgrtk", p * _over_keys(channel), k), jnp.moveaxis(k, -1, 0))
    covariance = jnp.moveaxis(moments, 0, -1) - mean[..., :, None] * mean[..., None, :]
    largest = jnp.max(p, axis=-1)[..., None, None]
    unit = jnp.eye(k.shape[-1], dtype=p.dtype)[None, None, None, None]
    factor = jnp.linalg.cholesky(covariance + call.ridge * jnp.where(largest > 0, largest, 1) * unit)
    return jax.scipy.linalg.cho_solve((factor, True), (mean - _grouped(call, call.q))[..., None])[..., 0]


def _grouped(call: LocalLinearCall, x: Array) -> Array:
    """[B, T, H, K] to [B, Hkv, R, T, K] in float32."""
    x = x.reshape(*x.shape[:2], call.k.shape[2], -1, x.shape[3])
    return jnp.moveaxis(x, 1, 3).astype(jnp.result_type(jnp.float32, x))


def _over_keys(channel: Array) -> Array:
    """[B, S, Hkv] to [B, Hkv, 1, 1, S]."""
    return jnp.moveaxis(channel, 1, 2)[:, :, None, None, :]
