"""Decay rates and step sizes as state-space models draw them, and forget gates with a lower bound."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from plait.models.axes import HEADS
from plait.models.build import Buffer, BuildContext, Initializer


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


class LowerBound(nnx.Module):
    """Forget gates above a learned bound that rises with depth: `f = b + (1 - b) sigmoid(y)`, a bound for each channel.

    b starts at l / L in layer l = 0, 1, ... of L, as in HGRN (arXiv 2311.04823), and is exactly 0 in the first. There the bounds of all
    layers are partial sums of one softmax (`SharedBounds`); a layer here has its own, `b = sigmoid(bias + logit(l / L))`, which starts
    at the same value, and that a later layer's lies above is left to training.
    """

    def __init__(self, ctx: BuildContext, dim: int):
        self.bias = ctx.param(jax.nn.initializers.zeros, (dim,), (HEADS,), role="decay")
        self.start = Buffer(jnp.asarray(ctx.layer_index, jnp.float32) / ctx.num_layers, axes=())

    def logit(self) -> jax.Array:
        """The bounds' log-odds `[dim]`: -inf in the first layer."""
        start = self.start[...]
        return self.bias[...].astype(jnp.float32) + jnp.log(start) - jnp.log1p(-start)

    def __call__(self, y: jax.Array) -> jax.Array:
        """`log f` of `y [B, T, dim]`, float32 and at most 0."""
        return raised(jax.nn.log_sigmoid(y.astype(jnp.float32)), self.logit()[None, None])


class SharedBounds(nnx.Module):
    """The bounds of all layers as HGRN and HGRN2 have them: partial sums of one softmax over the layers, without the share of the first."""

    def __init__(self, ctx: BuildContext, dim: int):
        self.scores = ctx.param(jax.nn.initializers.zeros, (ctx.num_layers, dim), (None, HEADS), role="decay")

    def __call__(self) -> jax.Array:
        """The bounds' log-odds `[layers, dim]`: -inf in the first layer."""
        first, others = jnp.split(self.scores[...].astype(jnp.float32), [1])
        none = jnp.full_like(first, -jnp.inf)
        if not len(others):
            return none
        behind, ahead = (jax.lax.cumlogsumexp(others, axis=0, reverse=reverse) for reverse in (False, True))
        return jnp.concatenate([none, behind - jnp.logaddexp(first, jnp.concatenate([ahead[1:], none]))])


def raised(g: jax.Array, logit: jax.Array) -> jax.Array:
    """`log(b + (1 - b) exp(g))`, b having the log-odds `logit`: sums of logarithms only, so that no gate rounds to 0."""
    return jnp.logaddexp(jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit) + g)
