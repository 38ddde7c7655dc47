"""Columns of a map of constant width, stretched over the tokens that a query sees: which tokens lie under which."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def seen_by(positions: jax.Array) -> jax.Array:
    """How many tokens of its document a query at each of `positions` sees, itself among them; 1 at padding."""
    return jnp.maximum(positions + 1, 1)


def starts(seen: jax.Array, width: int) -> jax.Array:
    """The first token under each of `width` columns over `seen` `[...]` tokens, and their end: `round(c seen / width)`, halves up.

    Returns:
      int32 `[..., width + 1]`. Where `seen` is less than the width, columns are empty. `width` must be even, and width seen below 2^31.

    Source: the authors' causal_resize_m_to_t.py (2310.01777).
    """
    column = jnp.arange(width + 1, dtype=jnp.int32).reshape(*[1] * seen.ndim, -1)
    return (seen[..., None] * column + width // 2) // width


def column_of(positions: jax.Array, seen: jax.Array, width: int) -> jax.Array:
    """The column over each of `positions`, of `width` over `seen` tokens, shapes that broadcast; of others one of the columns too."""
    return jnp.clip(((2 * positions + 1) * width - 1) // (2 * seen), 0, width - 1)


def how_many(seen: jax.Array, heads: int, width: int, top_k: int) -> jax.Array:
    """How many of all heads' columns cover about `top_k` of `seen` tokens a head: `round(heads top_k width / seen)`, from 1 to all."""
    share = 2 * heads * width * top_k
    return jnp.clip((share + seen) // (2 * seen), 1, heads * width)


def most_tokens(length: int, heads: int, width: int, top_k: int) -> int:
    """The most tokens that lie under a head's chosen columns, whatever its share of them, for queries that see up to `length` tokens."""
    seen = np.arange(1, length + 1)
    columns = np.minimum(np.clip((2 * heads * width * top_k + seen) // (2 * seen), 1, heads * width), width)
    return int(np.minimum(seen, columns * -(-seen // width)).max())


def best(scores: jax.Array, count: jax.Array) -> jax.Array:
    """bool of the shape of `scores` `[B, T, H, K]`: the `count` `[B, T]` largest of a token, over all heads; of equals the first."""
    flat = scores.reshape(*scores.shape[:2], -1)
    rank = jnp.argsort(jnp.argsort(-flat, axis=-1), axis=-1)
    return (rank < count[..., None]).reshape(scores.shape)


def tokens_under(columns: jax.Array, seen: jax.Array, most: int) -> jax.Array:
    """The tokens under those `columns`, bool `[B, T, H, K]`, over `seen` `[B, T]` tokens.

    Returns:
      int32 `[B, T, H, most]`: places in the document, in order, and -1 behind them.
    """
    width = columns.shape[-1]
    first = starts(seen, width)
    size = jnp.where(columns, jnp.diff(first, axis=-1)[:, :, None], 0)
    end = jnp.cumsum(size, axis=-1)
    slot = jnp.arange(most, dtype=jnp.int32)
    find = lambda end: jnp.searchsorted(end, slot, side="right")
    column = jax.vmap(find)(end.reshape(-1, width)).reshape(*end.shape[:-1], most)
    real, column = column < width, jnp.minimum(column, width - 1)
    offset = first[:, :, None, :-1] - (end - size)  # from a slot to its token
    token = slot[None, None, None] + jnp.take_along_axis(offset, column, axis=-1)
    return jnp.where(real, token, -1).astype(jnp.int32)
