"""Gated DeltaNet: a decaying state that overwrites what it stored under a key."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Channels, Epsilon, Factor, Heads, Taps
from plait.kernels import delta_rule, delta_rule_rows
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.decays import inverse_softplus_step, log_uniform_rate
from plait.models.linear import Dense
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.heads import require_divides
from plait.models.mixers.linear.recurrent import Recurrent
from plait.models.norms import l2_normalize
from plait.models.short_conv import ShortConv


@register(
    "gated_deltanet",
    kind="linear",
    source="Gated Delta Networks (2412.06464)",
    proof="transformers: Qwen3-Next",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(MixerConfig):
    """`S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T`, `o_t = S_t^T q_t / sqrt(K)`.

    `log a = -exp(A_log) softplus(W_a x + dt_bias)`, `b = sigmoid(W_b x)`; q, k and v are convolved, q and k of unit norm.
    """

    num_heads: Heads | None = None
    """Query and key heads; None gives the published 3/4 d_model / head_dim."""
    num_v_heads: Heads | None = None
    """Value heads, a multiple of num_heads; None gives num_heads."""
    head_dim: Channels = 256
    """Channels of a query and key head."""
    expand_v: Factor = 2.0
    """Channels of a value head over head_dim."""
    conv_size: Taps = 4
    """Taps of the short convolutions on q, k and v."""
    negative_eigenvalues: bool = False
    """Writes with b in (0, 2) in place of (0, 1), so that the state can flip signs (arXiv 2411.12537)."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the per-head output norm."""

    def check(self) -> None:
        if int(self.head_dim * self.expand_v) < 1:
            raise ValueError(
                f"expand_v={self.expand_v} must leave at least one of head_dim={self.head_dim} channels; use 1.0 or more"
            )

    @classmethod
    def example(cls) -> GatedDeltaNetConfig:
        return cls(num_heads=4, head_dim=8)

    def heads(self, d_model: int) -> tuple[int, int]:
        """`(num_heads, num_v_heads)` at width `d_model`."""
        num_heads = self.num_heads or 3 * d_model // (4 * self.head_dim)
        if num_heads == 0:
            raise ValueError(
                f"head_dim={self.head_dim} is too wide for 3/4 of d_model={d_model}; set num_heads or a smaller head_dim"
            )
        num_v_heads = self.num_v_heads or num_heads
        require_divides(("num_heads", num_heads), ("num_v_heads", num_v_heads))
        return num_heads, num_v_heads

    @property
    def head_v_dim(self) -> int:
        """Channels of a value head."""
        return int(self.head_dim * self.expand_v)

    def build(self, d_model: int, ctx: BuildContext) -> GatedDeltaNet:
        return GatedDeltaNet(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        num_heads, num_v_heads = self.heads(d_model)
        convolved = 2 * num_heads * self.head_dim + num_v_heads * self.head_v_dim
        return 6.0 * num_v_heads * self.head_dim * self.head_v_dim + 2.0 * self.conv_size * convolved


class DeltaInputs(NamedTuple):
    q: jax.Array  # [B, T, H, K], unit norm
    k: jax.Array  # [B, T, H, K], unit norm
    v: jax.Array  # [B, T, Hv, V]
    g: jax.Array  # [B, T, Hv] float32, at most 0
    beta: jax.Array  # [B, T, Hv] float32


class GatedDeltaNet(Recurrent):
    """See `GatedDeltaNetConfig`. Heads of the contract are the value heads."""

    convs = ("q_conv", "k_conv", "v_conv")
    recur = staticmethod(delta_rule)
    recur_rows = staticmethod(delta_rule_rows)

    def __init__(self, config: GatedDeltaNetConfig, d_model: int, ctx: BuildContext):
        self.config = config
        self.num_qk_heads, self.num_heads = config.heads(d_model)
        self.head_dims = config.head_dim, config.head_v_dim
        key_width, value_width = self.num_qk_heads * config.head_dim, self.num_heads * config.head_v_dim
        self.q, self.k = (Dense(ctx, d_model, key_width, (EMBED, HEADS), heads=(1, self.num_qk_heads)) for _ in range(2))
        self.v = Dense(ctx, d_model, value_width, (EMBED, HEADS), heads=(1, self.num_heads))
        self.q_conv, self.k_conv, self.v_conv = (
            ShortConv(ctx, width, size=config.conv_size, axis=HEADS) for width in (key_width, key_width, value_width)
        )
        self.a, self.b = (Dense(ctx, d_model, self.num_heads, (EMBED, HEADS), role="gate") for _ in range(2))
        self.A_log = ctx.param(log_uniform_rate(1e-2, 16.0), (self.num_heads,), (HEADS,), role="decay")
        self.dt_bias = ctx.param(inverse_softplus_step(), (self.num_heads,), (HEADS,), role="decay")
        self.gated_output(ctx, d_model, norm_eps=config.norm_eps)

    def project(self, x, *, at, state):
        streams = {"q_conv": self.q(x), "k_conv": self.k(x), "v_conv": self.v(x)}
        (q, k, v), state = self.convolve(streams, at=at, state=state)
        rate, bias = (p[...].astype(jnp.float32)[None, None] for p in (self.A_log, self.dt_bias))
        g = -jnp.exp(rate) * jax.nn.softplus(self.a(x).astype(jnp.float32) + bias)
        beta = jax.nn.sigmoid(self.b(x).astype(jnp.float32)) * (2.0 if self.config.negative_eigenvalues else 1.0)
        q, k = (l2_normalize(self.heads(y, self.num_qk_heads)) for y in (q, k))
        return DeltaInputs(q, k, self.heads(v), g, beta), state
