"""The plain MLP of GPT-style blocks."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax.numpy as jnp

from plait.configs.domains import Width
from plait.models.axes import EMBED, MLP
from plait.models.build import BuildContext
from plait.models.channel_mixers.base import ChannelMixer, ChannelMixerConfig, MixedChannels, register
from plait.models.channel_mixers.gated_mlp import ACTIVATIONS, Activation
from plait.models.layers.linear import Dense
from plait.models.layers.token_shift import TokenShift


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
    token_shift: bool = False
    """Read a learned mix of a token and the one before, `x_t + m (x_{t-1} - x_t)`, as in RWKV; m starts as in RWKV-7."""

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

        left = 1 - ctx.layer_index / ctx.num_layers
        start = lambda key, shape, dtype: 1 - (jnp.arange(d_model, dtype=dtype) / d_model) ** left**4
        self.mix = ctx.param(start, (d_model,), (EMBED,)) if config.token_shift else None
        self.shift = TokenShift(ctx, d_model)

    def __call__(self, x, *, at):
        return MixedChannels(self.advance(x, None, at=at)[0])

    def init_state(self, batch_size):
        return None if self.mix is None else self.shift.init_state(batch_size)

    def advance(self, x, state, *, at):
        if self.mix is not None:
            before, state = self.shift(x, at=at, state=state)
            x = x + (before - x) * self.mix[...].astype(x.dtype)[None, None]
        return self.down(self.activation(self.up(x))), state
