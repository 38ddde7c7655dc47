"""HGRN2: forget gates with a lower bound that rises with depth, and keys that are what is forgotten."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from plait.configs.domains import Channels, Epsilon
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.decays import LowerBound
from plait.models.linear import Dense
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.heads import whole_heads
from plait.models.mixers.linear.recurrent import Decayed, Recurrent


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

    @classmethod
    def example(cls) -> HGRN2Config:
        return cls(head_dim=16)

    def build(self, d_model: int, ctx: BuildContext) -> HGRN2:
        return HGRN2(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return 4.0 * d_model * self.head_dim


class HGRN2(Recurrent):
    """See `HGRN2Config`."""

    def __init__(self, config: HGRN2Config, d_model: int, ctx: BuildContext):
        self.num_heads, self.head_dims = whole_heads(d_model, config.head_dim), (config.head_dim, config.head_dim)
        self.q, self.f, self.i = (
            Dense(ctx, d_model, d_model, (EMBED, HEADS), role=role, heads=(1, self.num_heads))
            for role in ("matrix", "gate", "matrix")
        )
        self.lower_bound = LowerBound(ctx, d_model)
        self.gated_output(ctx, d_model, norm_eps=config.norm_eps, norm="all", gate=None)

    def project(self, x, *, at, state):
        g = self.heads(self.lower_bound(self.f(x)))
        q, v = self.heads(jax.nn.silu(self.q(x))), self.heads(self.i(x))
        return Decayed(q, -jnp.expm1(g).astype(q.dtype), v, g), state
