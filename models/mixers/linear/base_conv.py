"""BaseConv: a short convolution gated by a projection, the layer between Based's attention layers."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import jax

from plait.configs.domains import Taps, Whole
from plait.kernels import Tokens
from plait.models.axes import BATCH, EMBED, HEADS, LENGTH, constrain
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.layers.short_conv import ShortConv
from plait.models.mixers.base import Mixed, Mixer, MixerConfig, register


@register(
    "base_conv",
    kind="linear",
    source="Simple linear attention language models balance the recall-throughput tradeoff (2402.18668)",
    proof="the authors' BaseConv",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConvConfig(MixerConfig):
    """`y = W_o (silu(conv(W_1 x + b_1)) * (W_2 x + b_2)) + b_o`, the convolution depthwise over the last tokens.

    As in the released language models; the paper's formula has neither inner width, SiLU nor output projection, but a skip.
    """

    opaque: ClassVar[str | None] = "a gated convolution has no heads"

    conv_size: Taps = 3
    """Taps of the convolution."""
    expand: Annotated[int, Whole(1, 64)] = 2
    """Inner width over d_model (the release counts both halves: 4)."""

    def build(self, d_model: int, ctx: BuildContext) -> BaseConv:
        return BaseConv(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return 2.0 * self.conv_size * self.expand * d_model


class BaseConv(Mixer):
    """See `BaseConvConfig`."""

    num_heads = 0

    def __init__(self, config: BaseConvConfig, d_model: int, ctx: BuildContext):
        width = config.expand * d_model
        self.value, self.gate = (Dense(ctx, d_model, width, (EMBED, HEADS), use_bias=True) for _ in range(2))
        self.conv = ShortConv(ctx, width, size=config.conv_size, axis=HEADS)
        self.o = Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init, use_bias=True)

    def _mix(self, x: jax.Array, at: Tokens, state: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        value, gate = (constrain(dense(x), (BATCH, LENGTH, HEADS)) for dense in (self.value, self.gate))
        convolved, state = self.conv(value, at=at, state=state)
        return self.o(convolved * gate), state

    def __call__(self, x, *, at, carry, observer=None):
        return Mixed(self._mix(x, at.placed(*x.shape[:2]), None)[0], carry)

    def init_state(self, batch_size, max_len):
        return self.conv.init_state(batch_size)

    def prefill(self, x, state, *, at, carry):
        y, state = self._mix(x, at.placed(*x.shape[:2]), state)
        return y, carry, state

    def step(self, x, state, *, at, carry):
        return self.prefill(x, state, at=at, carry=carry)
