"""Retention: a state that fades at a fixed rate, another for each head."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from plait.configs.domains import Base, Epsilon, Factor, Heads
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.heads import expanded, require_divides
from plait.models.mixers.linear.recurrent import Decayed, Recurrent
from plait.models.positions.rope import rotate


@register(
    "retnet",
    kind="linear",
    source="Retentive Network: A Successor to Transformer for Large Language Models (2307.08621)",
    proof="fla: naive_retention, and the layer by hand",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RetNetConfig(MixerConfig):
    """`S_t = (1 - 2^(-5-h)) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t / sqrt(K)` in head h = 0, 1, ..., with q and k rotated;
    outputs are RMS-normalised by head and gated by `silu(W_g x)`."""

    num_heads: Heads = 4
    """Heads; the state of each is (d_model / num_heads) x (expand_v d_model / num_heads)."""
    expand_v: Factor = 2.0
    """Total value width over d_model."""
    rope_theta: Base = 10_000.0
    """Base of the rotary embedding."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the per-head output norm."""

    def dims(self, d_model: int) -> tuple[int, int]:
        """Key and value channels of a head at width `d_model`."""
        value_width = expanded(self.expand_v, d_model, name="expand_v")
        require_divides(("num_heads", self.num_heads), ("d_model / 2", d_model // 2))  # channels are rotated in pairs
        require_divides(("num_heads", self.num_heads), ("expand_v * d_model", value_width))
        return d_model // self.num_heads, value_width // self.num_heads

    def build(self, d_model: int, ctx: BuildContext) -> RetNet:
        return RetNet(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        key_dim, value_dim = self.dims(d_model)
        return 4.0 * self.num_heads * key_dim * value_dim


class RetNet(Recurrent):
    """See `RetNetConfig`."""

    def __init__(self, config: RetNetConfig, d_model: int, ctx: BuildContext):
        self.config, self.num_heads = config, config.num_heads
        self.head_dims = config.dims(d_model)
        value_width = self.num_heads * self.head_dims[1]
        self.q, self.k, self.v = (
            Dense(ctx, d_model, width, (EMBED, HEADS), heads=(1, self.num_heads)) for width in (d_model, d_model, value_width)
        )
        self.gated_output(ctx, d_model, norm_eps=config.norm_eps)

    def project(self, x, *, at, state):
        q, k = (rotate(self.heads(dense(x)), at.positions, self.config.rope_theta) for dense in (self.q, self.k))
        g = np.log1p(-(2.0 ** (-5.0 - np.arange(self.num_heads))))
        g = jnp.broadcast_to(jnp.asarray(g, jnp.float32)[None, None], (*x.shape[:2], self.num_heads))
        return Decayed(q, k, self.heads(self.v(x)), g), state
