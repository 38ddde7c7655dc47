"""The effective rank, shared by the probes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def effective_rank(x: jax.Array) -> jax.Array:
    """exp of the entropy of the singular values of `x` `[..., N, M]` as shares of their sum: from 1 to min(N, M), 0 where x is 0.

    By the smaller of the two Gram matrices: singular values below the root of its size times the float32 epsilon of the largest are
    rounding there, and count as 0.
    Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality (EUSIPCO 2007).
    """
    x = x.astype(jnp.float32)
    x = x if x.shape[-2] <= x.shape[-1] else jnp.swapaxes(x, -1, -2)
    largest = jnp.abs(x).max((-2, -1), keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1.0)
    squares = jnp.linalg.eigvalsh(jnp.einsum("...nd,...md->...nm", x, x, precision="highest"))
    seen = squares > x.shape[-2] * jnp.finfo(jnp.float32).eps * squares[..., -1:]
    values = jnp.sqrt(jnp.where(seen, squares, 0.0))
    total = values.sum(-1, keepdims=True)
    shares = values / jnp.where(total > 0, total, 1.0)
    entropy = -(shares * jnp.log(jnp.where(shares > 0, shares, 1.0))).sum(-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0.0)
