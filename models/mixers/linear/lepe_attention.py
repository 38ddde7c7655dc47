"""What the linear attentions of vision backbones share: a gate, rotated features, and a convolution of the values beside them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Base, Channels, Heads, Taps
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.heads import join_heads, resolve_heads, split_heads
from plait.models.mixers.linear.feature_attention import FeatureAttention, FeatureConfig
from plait.models.mixers.linear.feature_maps import elu
from plait.models.mixers.linear.local_conv import Lepe
from plait.models.positions.rope import rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class LepeConfig(FeatureConfig):
    """Options of these layers. Images become sequences: rotations and convolutions have one dimension, and both are causal where the
    layer is."""

    num_heads: Heads | None = None
    """Heads; None gives d_model / head_dim."""
    head_dim: Channels = 64
    """Channels of a head."""
    rope_theta: Base | None = 10_000.0
    """Base of the rotary embedding, which turns features in the weights and not in what normalises them; None for none."""
    lepe_size: Taps = 5
    """Taps of the depthwise convolution of the values that is added to the output (LePE, arXiv 2107.00652)."""

    def check(self) -> None:
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even where rope_theta={self.rope_theta} rotates channels in pairs; "
                f"use {self.head_dim + 1}, or rope_theta=None"
            )
        if self.lepe_size % 2 == 0:
            raise ValueError(f"lepe_size={self.lepe_size} must be odd, to have a middle; use {self.lepe_size + 1}")

    @classmethod
    def example(cls):
        return cls(num_heads=4, head_dim=16)

    def heads(self, d_model: int) -> int:
        return resolve_heads(self.num_heads, d_model, self.head_dim)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        convolved = self.heads(d_model) * self.head_dim
        return super().mixing_flops(d_model, seq_len) + 2.0 * self.lepe_size * convolved


class LepeInputs(NamedTuple):
    """What the weights and outputs of these layers are made of; features are float32."""

    q: jax.Array
    """`[B, T, H, K]`."""
    k: jax.Array
    q_turned: jax.Array
    """The same, rotated."""
    k_turned: jax.Array
    v: jax.Array
    """`[B, T, H, V]`."""
    lepe: jax.Array
    """The convolved values."""


class LepeAttention(FeatureAttention):
    """Projections with biases, features, weights, LePE. Subclasses write `weigh` and `finish`, and `features` where they are others."""

    convs = ("lepe",)

    def __init__(self, config: LepeConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.config = config
        width = self.num_heads * config.head_dim
        self.q, self.k, self.v, self.gate = (
            Dense(ctx, d_model, width, (EMBED, HEADS), heads=(1, self.num_heads), use_bias=True, role=role)
            for role in ("matrix", "matrix", "matrix", "gate")
        )
        self.lepe = Lepe(ctx, width, size=config.lepe_size)
        self.o = Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads), use_bias=True)

    def features(self, q: jax.Array, k: jax.Array, turn: Any) -> tuple[jax.Array, ...]:
        """Features `q, k` and `turn` of them; `turn` rotates by position."""
        q, k = elu(q), elu(k)
        return q, k, turn(q), turn(k)

    def project(self, x, *, at, state):
        q, k, v = (self.heads(dense(x)) for dense in (self.q, self.k, self.v))
        (lepe,), state = self.convolve({"lepe": join_heads(v)}, at=at, state=state)
        theta = self.config.rope_theta
        turn = lambda y: y if theta is None else rotate(y, at.positions, theta)
        features = self.features(q.astype(jnp.float32), k.astype(jnp.float32), turn)
        return LepeInputs(*features, v, split_heads(lepe, self.num_heads)), state  # type: ignore[call-arg]

    def finish(self, o, inputs, x):
        return (o + inputs.lepe) * split_heads(self.gate(x), self.num_heads)
