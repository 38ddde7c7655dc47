"""The gated MLP of Llama-style blocks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, Self

import jax
import jax.numpy as jnp

from plait.configs.domains import Positive, Width
from plait.models.axes import EMBED, MLP
from plait.models.build import BuildContext
from plait.models.channel_mixers.base import ChannelMixer, ChannelMixerConfig, MixedChannels, register
from plait.models.layers.linear import Dense

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
Activation = Literal["silu", "gelu", "gelu_erf", "relu", "relu2"]
"""`gelu` is its approximation by tanh, `relu2` the square of relu."""


@register("gated_mlp", source="GLU Variants Improve Transformer (2002.05202)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedMLPConfig(ChannelMixerConfig):
    """`W_down(act(W_gate x) * W_up x)`."""

    hidden_dim: Width | None = None
    """Inner width; None gives 8/3 of d_model rounded up to a multiple of 64 (4 d_model's parameters over three matrices)."""
    activation: Activation = "silu"
    """Of the gate."""
    use_bias: bool = False
    """Biases of all three projections."""
    multipliers: tuple[Positive, ...] | None = None
    """Multiplies what the activation reads, and the output (Falcon-H1); None for 1."""

    def check(self) -> None:
        if self.multipliers is not None and len(self.multipliers) != 2:
            raise ValueError(f"multipliers={self.multipliers} must be two, of the gate and of the output; use None for neither")

    def width(self, d_model: int) -> int:
        """Inner width for `d_model`."""
        return self.hidden_dim or -(-8 * d_model // 3 // 64) * 64

    def settled(self, d_model: int) -> Self:
        return dataclasses.replace(self, hidden_dim=self.width(d_model))

    def build(self, d_model: int, ctx: BuildContext) -> GatedMLP:
        return GatedMLP(self, d_model, ctx)


class GatedMLP(ChannelMixer):
    """See `GatedMLPConfig`."""

    def __init__(self, config: GatedMLPConfig, d_model: int, ctx: BuildContext):
        self.activation = ACTIVATIONS[config.activation]
        width = config.width(d_model)
        self.multipliers = config.multipliers
        self.gate = Dense(ctx, d_model, width, (EMBED, MLP), use_bias=config.use_bias)
        self.up = Dense(ctx, d_model, width, (EMBED, MLP), use_bias=config.use_bias)
        self.down = Dense(ctx, width, d_model, (MLP, EMBED), init=ctx.residual_init, use_bias=config.use_bias)

    def __call__(self, x, *, at):
        if self.multipliers is None:
            return MixedChannels(self.down(self.activation(self.gate(x)) * self.up(x)))
        before, after = (jnp.asarray(factor, x.dtype) for factor in self.multipliers)
        return MixedChannels(self.down(self.activation(self.gate(x) * before) * self.up(x)) * after)
