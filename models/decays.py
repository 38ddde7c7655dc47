"""Initial values of decay rates and step sizes, as state-space models draw them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from plait.models.build import Initializer


def log_uniform_rate(low: float, high: float) -> Initializer:
    """`log A` with A uniform in `[low, high)`: the parameter `A_log` of decays `-exp(A_log) dt`."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

    return init


def inverse_softplus_step(low: float = 1e-3, high: float = 0.1, floor: float = 0.0) -> Initializer:
    """Inverse softplus of a step log-uniform in `[low, high]` and at least `floor`: the parameter `dt_bias` (Mamba, 2312.00752)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(low), math.log(high)))
        dt = jnp.maximum(dt, floor) if floor else dt
        return dt + jnp.log(-jnp.expm1(-dt))

    return init
