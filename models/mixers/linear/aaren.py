"""Aaren: softmax attention of one learned query, a recurrence over its prefixes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Channels, Heads
from plait.models.axes import BATCH, EMBED, HEADS, constrain
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.heads import resolve_heads
from plait.models.mixers.linear.lightnet import NOTHING, share_of_sum
from plait.models.mixers.linear.recurrent import Decayed, Recurrent


@register(
    "aaren",
    kind="linear",
    source="Attention as an RNN (2405.13956)",
    proof="the paper's scan of (m, u, w), and softmax over prefixes",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AarenConfig(MixerConfig):
    """`o_t = sum_{j <= t} exp(s_j) v_j / sum_{j <= t} exp(s_j)`, `s_j = q . k_j / sqrt(K)`, q learned and the same for all tokens.

    As a recurrence, `o_t = exp(z_{t-1} - z_t) o_{t-1} + exp(s_t - z_t) v_t` with `z_t = log sum_{j <= t} exp(s_j)`: the paper's (m, u, w)
    with `m + log u = z` and `w / u = o`. There the first layer's query is learned and further ones are what the layer before made of it;
    here each layer learns its own.
    """

    num_heads: Heads | None = None
    """Heads; None gives d_model / head_dim."""
    head_dim: Channels = 64
    """Channels of a head."""

    @classmethod
    def example(cls) -> AarenConfig:
        return cls(num_heads=4, head_dim=16)

    def heads(self, d_model: int) -> int:
        """Heads at width `d_model`."""
        return resolve_heads(self.num_heads, d_model, self.head_dim)

    def build(self, d_model: int, ctx: BuildContext) -> Aaren:
        return Aaren(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return 4.0 * self.heads(d_model) * self.head_dim  # scores, and a read of the one row of the state


class AarenState(NamedTuple):
    memory: jax.Array  # [B, H, 1, V] float32, the last output
    convs: Mapping[str, jax.Array]
    z: jax.Array  # [B, H, 1] float32, the logarithm of the weights so far


class Aaren(Recurrent):
    """See `AarenConfig`."""

    scale = 1.0

    def __init__(self, config: AarenConfig, d_model: int, ctx: BuildContext):
        self.config, self.num_heads = config, config.heads(d_model)
        self.head_dims = 1, config.head_dim
        width = self.num_heads * config.head_dim
        self.query = ctx.param(jax.nn.initializers.normal(1.0), (self.num_heads, config.head_dim), (HEADS, None))
        self.k, self.v = (Dense(ctx, d_model, width, (EMBED, HEADS), heads=(1, self.num_heads)) for _ in range(2))
        self.o = Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads))

    def project(self, x, *, at, state):
        k, q = self.heads(self.k(x)).astype(jnp.float32), self.query[...].astype(jnp.float32)
        s = self.config.head_dim**-0.5 * jnp.einsum("bthk,hk->bth", k, q)[..., None]
        share, g, z = share_of_sum(s, at=at.placed(*x.shape[:2]), start=None if state is None else state.z)
        return Decayed(jnp.ones_like(share), share, self.heads(self.v(x)), g), None if state is None else state._replace(z=z)

    def init_state(self, batch_size, max_len):
        memory, convs = super().init_state(batch_size, max_len)
        z = jnp.full((batch_size, self.num_heads, 1), NOTHING, jnp.float32)
        return AarenState(memory, convs, constrain(z, (BATCH, HEADS, None)))

    def finish(self, o, inputs, x):
        return o.astype(x.dtype)
