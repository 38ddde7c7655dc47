"""Depthwise convolutions over the nearest tokens, on both sides where a layer is not causal."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from plait.kernels import Tokens, short_conv
from plait.models.axes import BATCH, HEADS, constrain
from plait.models.build import BuildContext


def local_conv(
    x: jax.Array, weight: jax.Array, *, causal: bool, at: Tokens, bias: jax.Array | None = None, state: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`y_t = b + sum_w weight_w x_{t - W + 1 + w}` within the document or, without `causal`, `x_{t - W // 2 + w}`; and the last inputs.

    Args:
        x: `[B, T, D]`.
        weight: `[W, D]`.
        state: the last W - 1 inputs, from which a causal one goes on.
    """
    convolve = functools.partial(short_conv, activation=None)
    if causal:
        return convolve(x, weight, bias=bias, initial_state=state, at=at)
    middle, flip = weight.shape[0] // 2, functools.partial(jnp.flip, axis=1)
    y, last = convolve(x, weight[: middle + 1], bias=bias, at=at)
    behind = dataclasses.replace(at, ids=None, segment_ids=flip(at.segment_ids), positions=None)
    ahead = jnp.concatenate([jnp.flip(weight[middle + 1 :], axis=0), jnp.zeros_like(weight[:1])])
    return y + flip(convolve(flip(x), ahead, at=behind)[0]), last


class _Local(nnx.Module):
    """The state of a convolution of `size` taps over `dim` channels."""

    def __init__(self, ctx: BuildContext, dim: int, *, size: int):
        self.size, self.dim, self.causal, self.dtype = size, dim, ctx.causal, ctx.compute_dtype

    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros: the start of a document."""
        return constrain(jnp.zeros((batch_size, self.size - 1, self.dim), self.dtype), (BATCH, None, HEADS))


class Lepe(_Local):
    """A `local_conv` with learned weights and bias: LePE (arXiv 2107.00652), where it convolves values."""

    def __init__(self, ctx: BuildContext, dim: int, *, size: int):
        super().__init__(ctx, dim, size=size)

        def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -(size**-0.5), size**-0.5)

        self.weight = ctx.param(init, (size, dim), (None, HEADS), role="conv")
        self.bias = ctx.param(init, (dim,), (HEADS,))

    def __call__(self, x: jax.Array, *, at: Tokens, state: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """`x [B, T, D]` to `y [B, T, D]` and the last `size - 1` inputs."""
        weight, bias = self.weight[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        return local_conv(x, weight, causal=self.causal, at=at, bias=bias, state=state)


class Neighbours(_Local):
    """The nearest tokens of each, itself among them, in order; zeros where its document has none."""

    def __call__(self, x: jax.Array, *, at: Tokens, state: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """`x [B, T, D]` to `[B, T, size * D]` and the last `size - 1` inputs."""
        wide = functools.partial(jnp.tile, reps=(1, 1, self.size))
        taps = jnp.repeat(jnp.eye(self.size, dtype=x.dtype), self.dim, axis=1)
        near, last = local_conv(wide(x), taps, causal=self.causal, at=at, state=None if state is None else wide(state))
        return near, last[..., : self.dim]
