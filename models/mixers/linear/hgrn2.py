"""HGRN2: forget gates with a lower bound that rises with depth, and keys that are what is forgotten."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from plait.configs.domains import Channels, Epsilon, Taps
from plait.models.axes import EMBED, HEADS
from plait.models.build import Buffer, BuildContext
from plait.models.layers.decays import LowerBound, SharedBounds, raised
from plait.models.layers.linear import Dense
from plait.models.layers.short_conv import ShortConv
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.heads import whole_heads
from plait.models.mixers.linear.recurrent import Decayed, Recurrent
from plait.models.stream import CarryUse

BOUNDS = "lower_bounds"
"""Name in the carry of the bounds of all layers."""


@register(
    "hgrn2",
    kind="linear",
    source="HGRN2: Gated Linear RNNs with State Expansion (2404.07904)",
    proof="fla: HGRN2Attention on naive_recurrent_gla",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class HGRN2Config(MixerConfig):
    """`S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T`, `o_t = S_t^T q_t / sqrt(K)`, `f = b + (1 - b) sigmoid(W_f x)`, `q = silu(W_q x)`.

    The bound b of a channel is learned and rises with depth from exactly 0 in the first layer (see `LowerBound` for how layers that do
    not know of each other start at the published bounds). All heads are normalised together; there is no output gate.
    """

    head_dim: Channels = 128
    """Channels of a key and of a value head, by which each channel's state is expanded; d_model / head_dim heads."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the output norm."""
    lower_bounds: Literal["layer", "model"] | None = "layer"
    """Bounds of a layer's own (`layer`), or as published, partial sums of one softmax over all layers of the model (`model`); None for
    none."""
    conv_size: Taps | None = None
    """Taps of short convolutions after the projections W_q, W_f and W_i; None for none."""

    @classmethod
    def example(cls) -> HGRN2Config:
        return cls(head_dim=16)

    def carries(self, d_model: int) -> tuple[CarryUse, ...]:
        if self.lower_bounds != "model":
            return ()
        return (CarryUse(BOUNDS, "model", (d_model,), functools.partial(SharedBounds, dim=d_model)),)

    def build(self, d_model: int, ctx: BuildContext) -> HGRN2:
        return HGRN2(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return 4.0 * d_model * self.head_dim + 6.0 * (self.conv_size or 0) * d_model


class HGRN2(Recurrent):
    """See `HGRN2Config`."""

    def __init__(self, config: HGRN2Config, d_model: int, ctx: BuildContext):
        self.num_heads, self.head_dims = whole_heads(d_model, config.head_dim), (config.head_dim, config.head_dim)
        self.q, self.f, self.i = (
            Dense(ctx, d_model, d_model, (EMBED, HEADS), role=role, heads=(1, self.num_heads))
            for role in ("matrix", "gate", "matrix")
        )
        self.convs = () if config.conv_size is None else ("q_conv", "f_conv", "i_conv")
        for name in self.convs:
            setattr(self, name, ShortConv(ctx, d_model, size=config.conv_size or 1, axis=HEADS, activation=None))
        self.lower_bound = LowerBound(ctx, d_model) if config.lower_bounds == "layer" else None
        self.layer = Buffer(jnp.asarray(ctx.layer_index), axes=()) if config.lower_bounds == "model" else None
        self.gated_output(ctx, d_model, norm_eps=config.norm_eps, norm="all", gate=None)

    def project(self, x, *, at, state):
        q, f, i = self.q(x), self.f(x), self.i(x)
        if self.convs:
            (q, f, i), state = self.convolve(dict(zip(self.convs, (q, f, i), strict=True)), at=at, state=state)
        g = jax.nn.log_sigmoid(f.astype(jnp.float32)) if self.lower_bound is None else self.lower_bound(f)
        q, v, g = self.heads(jax.nn.silu(q)), self.heads(i), self.heads(g)
        return Decayed(q, _written(g, q), v, g), state

    def share(self, inputs, carry):
        """A layer that stands alone is as the first, which has no bound."""
        if self.layer is None or BOUNDS not in carry:
            return inputs, carry
        g = raised(inputs.g, self.heads(carry[BOUNDS][:, :, self.layer[...]]))
        return inputs._replace(k=_written(g, inputs.q), g=g), carry


def _written(g: jax.Array, q: jax.Array) -> jax.Array:
    """What is forgotten, as queries are."""
    return -jnp.expm1(g).astype(q.dtype)
