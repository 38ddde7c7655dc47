"""Means over what counts, shared by the probes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from plait.kernels import Tokens
from plait.models.looks.look import Look


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


def longest(at: Tokens) -> tuple[jax.Array, jax.Array]:
    """Where the longest document of each row begins and how many tokens it has, `[B]` int32; (0, 0) of rows of padding."""
    place = jnp.where(at.segment_ids > 0, at.positions, -1)
    last = jnp.argmax(place, axis=1)
    length = place.max(1) + 1
    return jnp.maximum(last + 1 - length, 0) * (length > 0), length


def concentration(load: jax.Array) -> jax.Array:
    """How far the most used is from even use, of the shares of tokens that use each, `[E]`: 0 where all are used alike, 1 where every
    token uses it; NaN where every token uses all."""
    even = load.mean()  # each token uses as many
    return jnp.where(even < 1, (load.max() - even) / jnp.maximum(1 - even, 1e-6), jnp.nan)


def weights(implied: jax.Array) -> jax.Array:
    """Implied attention `[B, H, R, S]` as shares: |A| over its row's sum, so that every layer kind can be compared."""
    a = jnp.abs(implied.astype(jnp.float32))
    largest = a.max(-1, keepdims=True)
    a = a / jnp.where(largest > 0, largest, 1.0)  # then the sum of a row is at least 1, however small its weights are
    return a / jnp.maximum(a.sum(-1, keepdims=True), 1.0)


def shares(look: Look, implied: jax.Array) -> jax.Array:
    """Rows `[B, H, R, S]` of the look's implied attention with what a softmax gives to a sink logit left to it; other kinds' as `weights`."""
    return jnp.abs(implied.astype(jnp.float32)) if "column_mass" in look.observed else weights(implied)


def off_sink(look: Look) -> jax.Array | None:
    """What of their attention the looked-at rows give to other tokens than the first of their document, `[B, H, R]`; None without rows."""
    if look.implied is None:
        return None
    later = look.at.positions > 0  # a token's own document is all that it sees
    return (shares(look, look.implied) * later[:, None, None, :]).sum(-1)


def upto(look: Look) -> jax.Array:
    """bool `[B, R, S]`: which tokens stand in the document of each looked-at row, up to the row."""
    documents, index = look.at.numbered(), jnp.arange(look.x.shape[1])
    same = (documents[:, look.rows, None] == documents[:, None, :]) & (documents[:, None, :] > 0)
    return same & (index[None, :] <= look.rows[:, None])[None]


def looked_at(look: Look, least: int = 1) -> jax.Array:
    """bool `[B, R]`: which looked-at rows have at least so many tokens before them in their document."""
    return (look.at.segment_ids[:, look.rows] > 0) & (look.at.positions[:, look.rows] >= least)


def mean_of_rows(x: jax.Array, told: jax.Array) -> jax.Array:
    """The mean `[H]` of `x` `[B, H, R]` over the rows `told` `[B, R]`; NaN where there is none."""
    return jnp.where(told.any(), masked_mean(x, told[:, None], axis=(0, 2)), jnp.nan)
