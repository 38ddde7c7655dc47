"""The gated MLP of Llama-style blocks."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from plait.configs.domains import Width
from plait.models.axes import EMBED, MLP
from plait.models.build import BuildContext
from plait.models.channel_mixers.base import ChannelMixer, ChannelMixerConfig, MixedChannels, register
from plait.models.linear import Dense

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}
Activation = Literal["silu", "gelu", "relu"]


@register("gated_mlp", source="GLU Variants Improve Transformer (2002.05202)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedMLPConfig(ChannelMixerConfig):
    """`W_down(act(W_gate x) * W_up x)`."""

    hidden_dim: Width | None = None
    """Inner width; None gives 8/3 of d_model rounded up to a multiple of 64 (4 d_model's parameters over three matrices)."""
    activation: Activation = "silu"
    """Of the gate."""

    def width(self, d_model: int) -> int:
        """Inner width for `d_model`."""
        return self.hidden_dim or -(-8 * d_model // 3 // 64) * 64

    def build(self, d_model: int, ctx: BuildContext) -> GatedMLP:
        return GatedMLP(self, d_model, ctx)


class GatedMLP(ChannelMixer):
    """See `GatedMLPConfig`."""

    def __init__(self, config: GatedMLPConfig, d_model: int, ctx: BuildContext):
        self.activation = ACTIVATIONS[config.activation]
        width = config.width(d_model)
        self.gate = Dense(ctx, d_model, width, (EMBED, MLP))
        self.up = Dense(ctx, d_model, width, (EMBED, MLP))
        self.down = Dense(ctx, width, d_model, (MLP, EMBED), init=ctx.residual_init)

    def __call__(self, x, *, at):
        return MixedChannels(self.down(self.activation(self.gate(x)) * self.up(x)))
