"""Attention as written: all scores, a dense mask, one normalisation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels.masks import BlockTable, Mask
from plait.kernels.shapes import accumulation_dtype
from plait.kernels.tokens import Tokens

Array = jax.Array

MASKED = -1e30
"""Stands for minus infinity in logits and statistics, so that no difference of two of them is NaN."""


class AttentionStats(NamedTuple):
    """What each query row did, float32 [B, T, H]; a row that sees no key has lse and max_logit -1e30 and the rest 0."""

    lse: Array
    """log of the row's normaliser, sink logit included; for the sigmoid, log of the row sum of weights."""
    max_logit: Array
    """Largest visible scaled logit, without sink logit and sigmoid bias."""
    entropy: Array
    """Entropy in nats of the row's weights on keys, normalised to sum to one (sink logit left out)."""
    first_mass: Array
    """Weight on the first token of the query's segment; for the sigmoid, share of the row sum."""


def scaled_logits(q: Array, k: Array, scale: float, precision: jax.lax.PrecisionLike) -> Array:
    """[B, T, H, K] and [B, S, Hkv, K] to logits [B, Hkv, H/Hkv, T, S] in the accumulation dtype."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    return scale * jnp.einsum(
        "btgrk,bsgk->bgrts", grouped, k, precision=precision, preferred_element_type=accumulation_dtype(q, k)
    )


def grouped_heads(x: Array, num_kv_heads: int) -> Array:
    """[B, H or 1, ...] to [B, Hkv or 1, R or 1, ...]."""
    return x.reshape(x.shape[0], *((1, 1) if x.shape[1] == 1 else (num_kv_heads, -1)), *x.shape[2:])


def by_head(x: Array) -> Array:
    """[B, Hkv, R, T] to [B, T, H]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, x.shape[-1]), 1, 2)


def apply(weights: Array, v: Array, precision: jax.lax.PrecisionLike) -> Array:
    """[B, Hkv, R, T, S] and [B, S, Hkv, V] to [B, T, H, V]."""
    o = jnp.einsum("bgrts,bsgv->btgrv", weights, v, precision=precision, preferred_element_type=weights.dtype)
    return o.reshape(*o.shape[:2], -1, o.shape[-1])


def unnormalised(
    logits: Array,
    visible: Array,
    first: Array,
    *,
    sinks: Array | None,
    normalizer: str,
    sigmoid_bias: Array | float | None,
    return_stats: bool,
) -> tuple[Array, Array, AttentionStats | None]:
    """Numerators [B, Hkv, R, T, S], denominators [B, Hkv, R, T, 1] and the statistics of logits under a mask that fits them.

    `first` [B, S] marks keys at position 0. Gradients are finite in rows that see nothing.
    """
    per_head = lambda x: jnp.asarray(x, logits.dtype).reshape(1, *logits.shape[1:3], 1, 1)
    logits = jnp.where(visible, logits, MASKED)
    peak = jnp.max(logits, axis=-1, keepdims=True, initial=MASKED)
    if normalizer == "sigmoid":
        bias = per_head(jnp.broadcast_to(jnp.asarray(sigmoid_bias), logits.shape[1] * logits.shape[2]))
        exponents = jax.nn.log_sigmoid(logits + bias)
        shift = jnp.zeros_like(peak)
    else:
        shift = jax.lax.stop_gradient(peak if sinks is None else jnp.maximum(peak, per_head(sinks)))
        exponents = logits - shift
    p = jnp.where(visible, jnp.exp(exponents), 0)
    mass = jnp.sum(p, axis=-1, keepdims=True)
    total = mass if sinks is None else mass + jnp.exp(per_head(sinks) - shift)
    divisor = jnp.where(total > 0, total, 1)
    if not return_stats:
        return p, jnp.ones_like(mass) if normalizer == "sigmoid" else divisor, None
    some = mass > 0
    safe_mass = jnp.where(some, mass, 1)
    spread = jnp.sum(jnp.where(visible, p * exponents, 0), axis=-1, keepdims=True)
    entropy = jnp.where(some, jnp.log(safe_mass) - spread / safe_mass, 0)
    lse = jnp.where(total > 0, jnp.log(divisor) + shift, MASKED)
    first_mass = jnp.sum(jnp.where(first[:, None, None, None, :], p, 0), axis=-1, keepdims=True) / divisor
    stats = AttentionStats(*(by_head(x[..., 0]) for x in (lse, peak, entropy, first_mass)))
    return p, jnp.ones_like(mass) if normalizer == "sigmoid" else divisor, stats


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask,
    segment_ids: Array | None,
    positions: Array | None,
    kv_segment_ids: Array | None,
    kv_positions: Array | None,
    block_table: BlockTable | None,
    scale: float,
    sinks: Array | None,
    normalizer: str,
    sigmoid_bias: Array | float | None,
    return_stats: bool,
) -> tuple[Array, AttentionStats | None]:
    """See `plait.kernels.attention`; always a pair here."""
    weights, stats = attention_weights(
        q,
        k,
        *sides(q, k, segment_ids=segment_ids, positions=positions, kv_segment_ids=kv_segment_ids, kv_positions=kv_positions),
        mask=mask,
        shown=None if block_table is None else grouped_heads(block_table.dense(q.shape[1], k.shape[1]), k.shape[2]),
        scale=scale,
        sinks=sinks,
        normalizer=normalizer,
        sigmoid_bias=sigmoid_bias,
        return_stats=return_stats,
    )
    return apply(weights, v.astype(weights.dtype), "highest").astype(q.dtype), stats


def unpacked(at: Tokens | None, kv_at: Tokens | None = None) -> dict[str, Any]:
    """The tokens as the implementations take them."""
    at, kv_at = (Tokens() if x is None else x for x in (at, kv_at))
    queries = {"segment_ids": at.segment_ids, "positions": at.positions}
    return queries | {"kv_segment_ids": kv_at.segment_ids, "kv_positions": kv_at.positions}


def sides(
    q: Array,
    k: Array,
    *,
    segment_ids: Array | None,
    positions: Array | None,
    kv_segment_ids: Array | None,
    kv_positions: Array | None,
) -> tuple[Tokens, Tokens]:
    """Query and key tokens; without key arguments the keys are the queries' own tokens."""
    queries = Tokens(None, segment_ids, positions).placed(*q.shape[:2])
    if kv_segment_ids is None and kv_positions is None:
        return queries, queries
    return queries, Tokens(None, kv_segment_ids, kv_positions).placed(*k.shape[:2])


def attention_weights(
    q: Array, k: Array, queries: Tokens, keys: Tokens, *, mask: Mask, shown: Array | None = None, scale: float, **options: Any
) -> tuple[Array, AttentionStats | None]:
    """The weights [B, Hkv, R, T, S] and the statistics; `shown` is one more mask that fits the weights."""
    dtype = accumulation_dtype(q, k)
    logits = scaled_logits(q.astype(dtype), k.astype(dtype), scale, "highest")
    visible = mask.dense(queries.positions, keys.positions, queries.segment_ids, keys.segment_ids)[:, None, None]
    visible = visible if shown is None else visible & shown
    p, divisor, stats = unnormalised(logits, visible, keys.positions == 0, **options)
    return p / divisor, stats
