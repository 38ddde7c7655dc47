"""Short causal convolution over time, one filter a channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from plait.kernels import Tokens, short_conv
from plait.models.axes import BATCH, constrain
from plait.models.build import BuildContext, Initializer


class ShortConv(nnx.Module):
    """`y_t = activation(b + sum_w weight_w * x_{t-w})` within the segment, depthwise."""

    def __init__(
        self,
        ctx: BuildContext,
        dim: int,
        *,
        size: int,
        axis: str | None,
        use_bias: bool = False,
        activation: Literal["silu"] | None = "silu",
        init: Initializer | None = None,
        filters: int | None = None,
    ):
        """Args:
        dim: channels, of logical axis `axis`.
        size: taps, the last one on the current token.
        init: of the taps `[size, filters]`, with biases of 0; by default both are uniform within `size^-1/2`.
        filters: how many different ones, each on as many channels in a row; None is one a channel.
        """
        self.size, self.dim, self.axis, self.dtype, self.activation = size, dim, axis, ctx.compute_dtype, activation

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -(size**-0.5), size**-0.5)

        self.weight = ctx.param(init or uniform, (size, filters or dim), (None, axis), role="conv")
        self.bias = ctx.param(jax.nn.initializers.zeros if init else uniform, (dim,), (axis,)) if use_bias else None

    def __call__(self, x: jax.Array, *, at: Tokens, state: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """`x [B, T, D]` to `y [B, T, D]` and the last `size - 1` inputs `[B, size - 1, D]`, from which `state` goes on."""
        bias = None if self.bias is None else self.bias[...].astype(x.dtype)
        weight = self.weight[...].astype(x.dtype)
        weight = jnp.repeat(weight, self.dim // weight.shape[1], axis=1)
        return short_conv(x, weight, bias=bias, activation=self.activation, initial_state=state, at=at)

    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros: the start of a document."""
        return constrain(jnp.zeros((batch_size, self.size - 1, self.dim), self.dtype), (BATCH, None, self.axis))


class Convolving(nnx.Module):
    """A module whose short convolutions go by name, and whose decode state keeps their last inputs under it, as `convs`."""

    convs: tuple[str, ...] = ()
    """Attributes that are short convolutions."""

    def convolve(self, streams: Mapping[str, jax.Array], *, at: Tokens, state: Any) -> tuple[list[jax.Array], Any]:
        """Each stream `[B, T, C]` through the convolution of its name, and the state, a NamedTuple or None, with their last inputs."""
        old = {} if state is None else state.convs
        found = {name: getattr(self, name)(y, at=at, state=old.get(name)) for name, y in streams.items()}
        if state is not None:
            state = state._replace(convs={name: last for name, (_, last) in found.items()})
        return [y for y, _ in found.values()], state

    def empty_convs(self, batch_size: int) -> dict[str, jax.Array]:
        """The last inputs at the start of a document."""
        return {name: getattr(self, name).init_state(batch_size) for name in self.convs}
