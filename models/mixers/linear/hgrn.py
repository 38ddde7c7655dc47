"""HGRN: a gated recurrence of channels, whose forget gates have a lower bound that rises with depth."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Epsilon, Factor
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.decays import LowerBound
from plait.models.layers.linear import Dense
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.heads import expanded
from plait.models.mixers.linear.channelwise import OPAQUE, Scanned


@register(
    "hgrn",
    kind="linear",
    source="Hierarchically Gated Recurrent Neural Network for Sequence Modeling (2311.04823)",
    proof="fla: HGRNAttention on naive_recurrent_hgrn",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class HGRNConfig(MixerConfig):
    """`h_t = f_t h_{t-1} + (1 - f_t) silu(W_i x_t)` by channel, `f = b + (1 - b) sigmoid(W_f x)`, `y = W_o (norm(h) silu(W_g x))`.

    The bound b of a channel is learned and rises with depth from exactly 0 in the first layer (see `LowerBound` for how layers that do
    not know of each other start at the published bounds). The paper's states also turn in the complex plane, by an angle a channel; here,
    as in flash-linear-attention and the studies made with it, they are real. There are no heads to route.
    """

    opaque = OPAQUE

    expand: Factor = 1.0
    """Channels of the state over d_model."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the output norm, over all channels."""

    def width(self, d_model: int) -> int:
        """Channels of the state at width `d_model`."""
        return expanded(self.expand, d_model)

    def build(self, d_model: int, ctx: BuildContext) -> HGRN:
        return HGRN(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return 0.0  # no products


class HGRNInputs(NamedTuple):
    v: jax.Array  # (1 - f) silu(i), [B, T, 1, D]
    g: jax.Array  # log f, [B, T, 1, D] float32, at most 0


class HGRN(Scanned):
    """See `HGRNConfig`. All channels are one head."""

    num_heads = 1

    def __init__(self, config: HGRNConfig, d_model: int, ctx: BuildContext):
        width = config.width(d_model)
        self.head_dims = (1, width)
        self.i, self.f = (Dense(ctx, d_model, width, (EMBED, HEADS), role=role) for role in ("matrix", "gate"))
        self.lower_bound = LowerBound(ctx, width)
        self.gated_output(ctx, d_model, norm_eps=config.norm_eps, norm="all")

    def project(self, x, *, at, state):
        g = self.lower_bound(self.f(x))
        i = jax.nn.silu(self.i(x))
        v = (-jnp.expm1(g) * i).astype(i.dtype)
        return HGRNInputs(v[:, :, None], g[:, :, None]), state
