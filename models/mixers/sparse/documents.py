"""How long the documents of a batch are."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from plait.kernels import Tokens


def document_lengths(at: Tokens) -> jax.Array:
    """int32 `[B, T]`: tokens of each token's document, up to its last one; of padding anything. `at` is placed."""
    number = at.numbered()
    row = jnp.arange(number.shape[0])[:, None]
    most = jnp.zeros((number.shape[0], number.shape[1] + 1), jnp.int32).at[row, number].max(at.positions + 1)
    return jnp.take_along_axis(most, number, axis=1)
