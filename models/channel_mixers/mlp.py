"""The plain MLP of GPT-style blocks."""

from __future__ import annotations

import dataclasses
from typing import Self

from plait.configs.domains import Width
from plait.models.axes import EMBED, MLP
from plait.models.build import BuildContext
from plait.models.channel_mixers.base import ChannelMixer, ChannelMixerConfig, MixedChannels, register
from plait.models.channel_mixers.gated_mlp import ACTIVATIONS, Activation
from plait.models.linear import Dense


@register("mlp", source="Attention Is All You Need (1706.03762); squared relu: Primer (2109.08668)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig(ChannelMixerConfig):
    """`W_down act(W_up x + b) + b'`."""

    hidden_dim: Width | None = None
    """Inner width; None gives 4 d_model."""
    activation: Activation = "gelu"
    """Of the inner channels."""
    use_bias: bool = True
    """Biases of both projections."""

    def width(self, d_model: int) -> int:
        """Inner width for `d_model`."""
        return self.hidden_dim or 4 * d_model

    def settled(self, d_model: int) -> Self:
        return dataclasses.replace(self, hidden_dim=self.width(d_model))

    def build(self, d_model: int, ctx: BuildContext) -> PlainMLP:
        return PlainMLP(self, d_model, ctx)


class PlainMLP(ChannelMixer):
    """See `MLPConfig`."""

    def __init__(self, config: MLPConfig, d_model: int, ctx: BuildContext):
        self.activation = ACTIVATIONS[config.activation]
        width = config.width(d_model)
        self.up = Dense(ctx, d_model, width, (EMBED, MLP), use_bias=config.use_bias)
        self.down = Dense(ctx, width, d_model, (MLP, EMBED), init=ctx.residual_init, use_bias=config.use_bias)

    def __call__(self, x, *, at):
        return MixedChannels(self.down(self.activation(self.up(x))))
