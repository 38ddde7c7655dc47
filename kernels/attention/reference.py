"""Attention as written: all scores, a dense mask, one normalisation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels.attention.call import AttentionCall
from plait.kernels.shapes import accumulation_dtype
from plait.kernels.tokens import Tokens

Array = jax.Array

MASKED = -1e30
"""Stands for minus infinity in logits and statistics, so that no difference of two of them is NaN."""


class AttentionStats(NamedTuple):
    """What each query row did, float32 [B, T, H]; a row that sees no key has lse and max_logit -1e30 and the rest 0.

    All are right and differentiable however small the row's weights are, beside a sink logit or under a low bias of the sigmoid.
    """

    lse: Array
    """log of the row's normaliser, sink logit included and alone where no key is seen; for the sigmoid, log of the row sum of weights."""
    max_logit: Array
    """Largest visible logit, scaled, biased and capped, without sink logit and sigmoid bias."""
    entropy: Array
    """Entropy in nats of the row's weights on keys, normalised to sum to one (sink logit left out)."""
    first_mass: Array
    """Weight on the first token of the query's segment; for the sigmoid, share of the row sum."""


def lse_alone(lse: Array) -> AttentionStats:
    """What a call with `return_lse` returns of its rows."""
    nothing: Any = None
    return AttentionStats(lse, nothing, nothing, nothing)


def logits(call: AttentionCall, queries: Tokens, keys: Tokens, precision: jax.lax.PrecisionLike) -> Array:
    """The logits [B, Hkv, H/Hkv, T, S], scaled, biased and capped, in the accumulation dtype."""
    q, k = call.q, call.k
    grouped = grouped_heads(jnp.swapaxes(q, 1, 2), k.shape[2])  # [B, Hkv, R, T, K]
    rows = grouped.reshape(*grouped.shape[:2], -1, q.shape[-1])  # a key head's queries are one matrix
    z = jnp.einsum("bgmk,bsgk->bgms", rows, k, precision=precision, preferred_element_type=accumulation_dtype(q, k))
    z = call.scale * z.reshape(*grouped.shape[:-1], -1)
    if call.bias is not None:
        bias = call.bias.at(queries.positions[:, :, None] - keys.positions[:, None, :])  # [H, B, T, S]
        z += grouped_heads(jnp.swapaxes(bias, 0, 1), k.shape[2]).astype(z.dtype)
    return capped(z, call.logit_soft_cap)


def capped(z: Array, soft_cap: float | None) -> Array:
    """Logits under a soft cap, or as they are."""
    return z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)


def visible_pairs(call: AttentionCall, queries: Tokens, keys: Tokens) -> Array:
    """bool [B, Hkv or 1, R or 1, T, S]: what the mask shows of what is selected."""
    visible = call.mask.dense(queries.positions, keys.positions, queries.segment_ids, keys.segment_ids)[:, None, None]
    if call.selected is None:
        return visible
    shown, num_heads = call.selected.shown(keys.positions), call.q.shape[2]
    if shown.shape[1] > 1:
        shown = jnp.repeat(shown, num_heads // shown.shape[1], axis=1)
    return visible & grouped_heads(shown, call.k.shape[2])


def grouped_heads(x: Array, num_kv_heads: int) -> Array:
    """[B, H or 1, ...] to [B, Hkv or 1, R or 1, ...]."""
    return x.reshape(x.shape[0], *((1, 1) if x.shape[1] == 1 else (num_kv_heads, -1)), *x.shape[2:])


def by_head(x: Array) -> Array:
    """[B, Hkv, R, T] to [B, T, H]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, x.shape[-1]), 1, 2)


def by_group(x: Array, num_kv_heads: int) -> Array:
    """[B, T, H] to [B, Hkv, R, T, 1]."""
    return grouped_heads(jnp.swapaxes(x, 1, 2), num_kv_heads)[..., None]


def apply(weights: Array, v: Array, precision: jax.lax.PrecisionLike) -> Array:
    """[B, Hkv, R, T, S] and [B, S, Hkv, V] to [B, T, H, V]."""
    rows = weights.reshape(*weights.shape[:2], -1, weights.shape[-1])
    o = jnp.einsum("bgms,bsgv->bgmv", rows, v, precision=precision, preferred_element_type=weights.dtype)
    return jnp.swapaxes(o.reshape(o.shape[0], -1, *weights.shape[3:4], o.shape[-1]), 1, 2)


def relative_weights(
    call: AttentionCall, queries: Tokens, keys: Tokens, precision: jax.lax.PrecisionLike
) -> tuple[Array, Array, AttentionStats | None]:
    """The weights [B, Hkv, R, T, S] relative to the largest of their row, what multiplies each row [B, Hkv, R, T, 1], and the statistics,
    of the call's q and k, which are at `queries` and `keys`. A row that sees nothing has a factor of 0.

    Gradients are finite in rows that see nothing.
    """
    z = logits(call, queries, keys, precision)
    per_head = lambda x: jnp.asarray(x, z.dtype).reshape(1, *z.shape[1:3], 1, 1)
    sinks = None if call.sink_logits is None else by_group(call.sink_logits.astype(z.dtype), z.shape[1])
    visible = visible_pairs(call, queries, keys)
    z = jnp.where(visible, z, MASKED)
    highest = jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True, initial=MASKED))
    exponents = z
    if call.sigmoid:
        log_weights = lambda z: jax.nn.log_sigmoid(z + per_head(call.sigmoid_bias))
        exponents, highest = log_weights(z), log_weights(highest)
    exponents -= highest
    some = highest > MASKED / 2
    p = jnp.exp(exponents)  # 0 of a hidden key, which is far below the largest; the factor hides rows without any
    mass = jnp.where(some, jnp.sum(p, axis=-1, keepdims=True), 1)
    lse = jnp.where(some, jnp.log(mass) + highest, MASKED)
    share: Any = 1 if sinks is None else jax.nn.sigmoid(lse - sinks)  # of the keys beside the sink logit
    factor = jnp.where(some, jnp.exp(highest) if call.sigmoid else share / mass, 0)
    lse = lse if sinks is None else jnp.logaddexp(lse, sinks)
    if not call.return_stats:
        return p, factor, lse_alone(by_head(lse[..., 0])) if call.return_lse else None
    spread = jnp.sum(jnp.where(visible, p * exponents, 0), axis=-1, keepdims=True)
    entropy = jnp.where(some, jnp.log(mass) - spread / mass, 0)
    first = some & (keys.positions == 0)[:, None, None, None, :]
    first_mass = share * jnp.sum(jnp.where(first, p, 0), axis=-1, keepdims=True) / mass
    peak = _largest(z)
    return p, factor, AttentionStats(*(by_head(x[..., 0]) for x in (lse, peak, entropy, first_mass)))


def normalized_weights(call: AttentionCall, lse: Array, queries: Tokens, keys: Tokens, precision: jax.lax.PrecisionLike) -> Array:
    """exp(z - lse) [B, Hkv, R, T, S] of rows whose lse [B, T, H] is known, 0 of hidden keys; other arguments as in `relative_weights`."""
    z = logits(call, queries, keys, precision)
    visible = visible_pairs(call, queries, keys)
    return jnp.where(visible, jnp.exp(jnp.where(visible, z - by_group(lse, call.k.shape[2]), 0)), 0)


def share(call: AttentionCall, queries: Tokens, keys: Tokens, precision: jax.lax.PrecisionLike) -> tuple[Array, AttentionStats]:
    """What has the gradients of these keys' share in `call.whole`: sum_j A_j (v_j - o) and sum_j A_j, with A_j = exp(z_j - lse)."""
    o, lse = call.whole
    p = normalized_weights(call, lse, queries, keys, precision)
    mass = by_head(p.sum(-1))
    return apply(p, call.v.astype(p.dtype), precision) - o * mass[..., None], lse_alone(mass)


def _largest(z: Array) -> Array:
    """The largest of the last axis, [..., 1], differentiated as the first that is: by its place, since a value that a compiler makes
    twice may differ from itself."""
    first = jnp.argmax(z, axis=-1, keepdims=True)
    return jnp.sum(jnp.where(jax.lax.broadcasted_iota(first.dtype, z.shape, z.ndim - 1) == first, z, 0), axis=-1, keepdims=True)


def attention(call: AttentionCall) -> tuple[Array, AttentionStats | None]:
    """See `plait.kernels.attention`; always a pair here."""
    if call.whole is not None:
        return share(call, *call.sides, "highest")
    weights, stats = attention_weights(call, *call.sides)
    return apply(weights, call.v.astype(weights.dtype), "highest").astype(call.q.dtype), stats


def attention_weights(call: AttentionCall, queries: Tokens, keys: Tokens) -> tuple[Array, AttentionStats | None]:
    """The weights [B, Hkv, R, T, S] and the statistics; arguments as in `relative_weights`."""
    dtype = accumulation_dtype(call.q, call.k)
    call = call.replace(q=call.q.astype(dtype), k=call.k.astype(dtype))
    p, factor, stats = relative_weights(call, queries, keys, "highest")
    return p * factor, stats
