"""Means over what counts, shared by the probes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """The mean of `x` over `axis` where `mask`, of its shape or broadcast to it, holds; 0 where it holds nowhere."""
    weight = jnp.broadcast_to(mask, x.shape).astype(jnp.float32)
    return (x * weight).sum(axis) / jnp.maximum(weight.sum(axis), 1.0)


def by_document(values: jax.Array, documents: jax.Array) -> jax.Array:
    """Sums of `[B, T, ...]` over the documents of a row, numbered from 1 (0 is padding): `[B, T, ...]`, document d at d - 1."""
    sums = functools.partial(jax.ops.segment_sum, num_segments=documents.shape[1] + 1)
    return jax.vmap(sums)(values, documents)[:, 1:]


def start_ratio(norms: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """Mean of `norms` `[B, T, ...]` at document starts over the mean elsewhere (padding left out): `[...]`, NaN-free."""
    shape = segment_ids.shape + (1,) * (norms.ndim - 2)
    real = (segment_ids > 0).reshape(shape)
    start = (positions == 0).reshape(shape)
    first = masked_mean(norms, real & start, axis=(0, 1))
    rest = masked_mean(norms, real & ~start, axis=(0, 1))
    return first / jnp.maximum(rest, 1e-30)


def weights(implied: jax.Array) -> jax.Array:
    """Implied attention `[B, H, R, S]` as shares: |A| over its row's sum, so that every layer kind can be compared."""
    a = jnp.abs(implied.astype(jnp.float32))
    largest = a.max(-1, keepdims=True)
    a = a / jnp.where(largest > 0, largest, 1.0)  # then the sum of a row is at least 1, however small its weights are
    return a / jnp.maximum(a.sum(-1, keepdims=True), 1.0)
