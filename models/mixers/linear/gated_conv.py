"""The gated short convolution of LFM2: a few taps between two gates."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

from plait.configs.domains import Taps
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.layers.short_conv import ShortConv
from plait.models.mixers.base import HeadKind, HeadMixer, MixerConfig, register
from plait.models.mixers.linear.channelwise import OPAQUE


@register(
    "gated_conv",
    kind="linear",
    source="LFM2 Technical Report (2511.23404)",
    proof="transformers: LFM2",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedConvConfig(MixerConfig):
    """`y = W_o (W_c x * conv(W_b x * W_v x))`, products of channels, the convolution causal, depthwise and without activation.

    It remembers its last taps and nothing else. The published `in_proj` holds the three projections side by side, b, c and v in turn. There
    are no heads to route.
    """

    opaque = OPAQUE

    conv_size: Taps = 3
    """Taps of the convolution."""
    use_bias: bool = False
    """Biases of the projections and of the convolution."""

    def head_kinds(self, d_model: int) -> tuple[HeadKind, ...]:
        return ("attention",)  # it weighs a few tokens

    def build(self, d_model: int, ctx: BuildContext) -> GatedConv:
        return GatedConv(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return 2.0 * self.conv_size * d_model


class GatedConvInputs(NamedTuple):
    v: jax.Array  # W_b x * W_v x, [B, T, 1, D]
    gate: jax.Array  # W_c x, [B, T, 1, D]


class GatedConv(HeadMixer):
    """See `GatedConvConfig`. All channels are one head; the state is the convolution's."""

    num_heads = 1

    def __init__(self, config: GatedConvConfig, d_model: int, ctx: BuildContext):
        self.b, self.c, self.v = (
            Dense(ctx, d_model, d_model, (EMBED, HEADS), role=role, use_bias=config.use_bias)
            for role in ("gate", "gate", "matrix")
        )
        self.conv = ShortConv(ctx, d_model, size=config.conv_size, axis=HEADS, use_bias=config.use_bias, activation=None)
        self.o = Dense(ctx, d_model, d_model, (HEADS, EMBED), init=ctx.residual_init, use_bias=config.use_bias)

    def project(self, x, *, at, state):
        v = self.b(x) * self.v(x)
        return GatedConvInputs(v[:, :, None], self.c(x)[:, :, None]), state

    def attend(self, inputs, *, at, state):
        y, last = self.conv(inputs.v[:, :, 0], at=at, state=state)
        return y[:, :, None], None if state is None else last

    def finish(self, o, inputs, x):
        return inputs.gate * o

    def output(self, o):
        return self.o(o[:, :, 0])

    def implied(self, inputs, rows, *, at):
        return None

    def init_state(self, batch_size, max_len):
        return self.conv.init_state(batch_size)
