"""The effective rank, shared by the probes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from plait.kernels.singular_values import singular_values

_ROUNDING = 8 * float(jnp.finfo(jnp.float32).eps)


def effective_rank(x: jax.Array) -> jax.Array:
    """exp of the entropy of the singular values of `x` `[..., N, M]` as shares of their sum: from 1 to min(N, M), 0 where x is 0, NaN where it
    is not finite.

    Singular values below 8 times the float32 epsilon of the largest are rounding, and count as 0.
    Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality (EUSIPCO 2007).
    """
    values = singular_values(x)
    values = jnp.where(values <= _ROUNDING * values[..., :1], 0.0, values)
    total = values.sum(-1, keepdims=True)
    shares = jnp.where(total == 0, 0.0, values / jnp.where(total == 0, 1.0, total))
    entropy = -(shares * jnp.log(jnp.where(shares == 0, 1.0, shares))).sum(-1)
    return jnp.where(total[..., 0] == 0, 0.0, jnp.exp(entropy))
