"""Gated DeltaNet: a decaying state that overwrites what it stored under a key."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels import Tokens, delta_rule
from plait.kernels.delta_rule import delta_rule_rows
from plait.models.axes import BATCH, EMBED, HEADS, LENGTH, constrain
from plait.models.build import BuildContext
from plait.models.linear import Dense
from plait.models.mixers.base import HeadMixer, MixerConfig, register
from plait.models.mixers.heads import join_heads, require_divides, require_positive, split_heads
from plait.models.mixers.stats import recurrent_statistics
from plait.models.norms import RMSNorm, l2_normalize
from plait.models.short_conv import ShortConv


@register("gated_deltanet", kind="linear", source="Gated Delta Networks (2412.06464)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(MixerConfig):
    """`S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T`, `o_t = S_t^T q_t / sqrt(K)`.

    `log a = -exp(A_log) softplus(W_a x + dt_bias)`, `b = sigmoid(W_b x)`; q, k and v are convolved, q and k of unit norm.
    """

    num_heads: int | None = None
    """Query and key heads; None gives the published 3/4 d_model / head_dim."""
    num_v_heads: int | None = None
    """Value heads, a multiple of num_heads; None gives num_heads."""
    head_dim: int = 256
    """Channels of a query and key head."""
    expand_v: float = 2.0
    """Channels of a value head over head_dim."""
    conv_size: int = 4
    """Taps of the short convolutions on q, k and v."""
    negative_eigenvalues: bool = False
    """Writes with b in (0, 2) in place of (0, 1), so that the state can flip signs (arXiv 2411.12537)."""
    norm_eps: float = 1e-5
    """Epsilon of the per-head output norm."""

    def __post_init__(self) -> None:
        path = f"model.mixers.{self.name}"
        require_positive(
            path, num_heads=self.num_heads, num_v_heads=self.num_v_heads, head_dim=self.head_dim, conv_size=self.conv_size
        )
        if int(self.head_dim * self.expand_v) < 1:
            raise ValueError(f"{path}.expand_v={self.expand_v} must leave at least one of head_dim={self.head_dim} channels")

    @classmethod
    def example(cls) -> GatedDeltaNetConfig:
        return cls(num_heads=4, head_dim=8)

    def heads(self, d_model: int) -> tuple[int, int]:
        """`(num_heads, num_v_heads)` at width `d_model`."""
        path = f"model.mixers.{self.name}"
        num_heads = self.num_heads or 3 * d_model // (4 * self.head_dim)
        if num_heads == 0:
            raise ValueError(
                f"{path}.head_dim={self.head_dim} is too wide for 3/4 of d_model={d_model}; set num_heads or a smaller head_dim"
            )
        num_v_heads = self.num_v_heads or num_heads
        require_divides(path, ("num_heads", num_heads), ("num_v_heads", num_v_heads))
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


class DeltaState(NamedTuple):
    memory: jax.Array  # [B, Hv, K, V] float32
    q_conv: jax.Array  # [B, conv_size - 1, H * K]
    k_conv: jax.Array
    v_conv: jax.Array  # [B, conv_size - 1, Hv * V]


class DeltaInputs(NamedTuple):
    q: jax.Array  # [B, T, H, K], unit norm
    k: jax.Array  # [B, T, H, K], unit norm
    v: jax.Array  # [B, T, Hv, V]
    g: jax.Array  # [B, T, Hv] float32, at most 0
    beta: jax.Array  # [B, T, Hv] float32


class GatedDeltaNet(HeadMixer):
    """See `GatedDeltaNetConfig`. Heads of the contract are the value heads."""

    def __init__(self, config: GatedDeltaNetConfig, d_model: int, ctx: BuildContext):
        self.config = config
        self.num_qk_heads, self.num_heads = config.heads(d_model)
        key_width, value_width = self.num_qk_heads * config.head_dim, self.num_heads * config.head_v_dim
        self.q = Dense(ctx, d_model, key_width, (EMBED, HEADS))
        self.k = Dense(ctx, d_model, key_width, (EMBED, HEADS))
        self.v = Dense(ctx, d_model, value_width, (EMBED, HEADS))
        self.q_conv = ShortConv(ctx, key_width, size=config.conv_size, axis=HEADS)
        self.k_conv = ShortConv(ctx, key_width, size=config.conv_size, axis=HEADS)
        self.v_conv = ShortConv(ctx, value_width, size=config.conv_size, axis=HEADS)
        self.a = Dense(ctx, d_model, self.num_heads, (EMBED, HEADS))
        self.b = Dense(ctx, d_model, self.num_heads, (EMBED, HEADS))
        self.A_log = ctx.param(_init_a_log, (self.num_heads,), (HEADS,))
        self.dt_bias = ctx.param(_init_dt_bias, (self.num_heads,), (HEADS,))
        self.gate = Dense(ctx, d_model, value_width, (EMBED, HEADS))
        self.norm = RMSNorm(ctx, config.head_v_dim, eps=config.norm_eps)
        self.o = Dense(ctx, value_width, d_model, (HEADS, EMBED), init=ctx.residual_init)

    def project(self, x, *, segment_ids, positions, state):
        old = (None,) * 3 if state is None else (state.q_conv, state.k_conv, state.v_conv)
        q, q_conv = self.q_conv(self.q(x), segment_ids=segment_ids, state=old[0])
        k, k_conv = self.k_conv(self.k(x), segment_ids=segment_ids, state=old[1])
        v, v_conv = self.v_conv(self.v(x), segment_ids=segment_ids, state=old[2])
        heads = lambda y, n: constrain(split_heads(y, n), (BATCH, LENGTH, HEADS, None))
        f32 = lambda p: p[...].astype(jnp.float32)[None, None]
        g = -jnp.exp(f32(self.A_log)) * jax.nn.softplus(self.a(x).astype(jnp.float32) + f32(self.dt_bias))
        beta = jax.nn.sigmoid(self.b(x).astype(jnp.float32)) * (2.0 if self.config.negative_eigenvalues else 1.0)
        q, k = l2_normalize(heads(q, self.num_qk_heads)), l2_normalize(heads(k, self.num_qk_heads))
        if state is not None:
            state = DeltaState(state.memory, q_conv, k_conv, v_conv)
        return DeltaInputs(q, k, heads(v, self.num_heads), g, beta), state

    def attend(self, inputs, *, segment_ids, positions, state):
        o, memory = delta_rule(*inputs, initial_state=None if state is None else state.memory, at=Tokens(None, segment_ids))
        return o, None if state is None else state._replace(memory=memory)

    def init_state(self, batch_size, max_len):
        memory = jnp.zeros((batch_size, self.num_heads, self.config.head_dim, self.config.head_v_dim), jnp.float32)
        memory = constrain(memory, (BATCH, HEADS, None, None))
        return DeltaState(memory, *(conv.init_state(batch_size) for conv in (self.q_conv, self.k_conv, self.v_conv)))

    def finish(self, o, x):
        return self.norm(o) * jax.nn.silu(split_heads(self.gate(x), self.num_heads))

    def output(self, o):
        return self.o(join_heads(o))

    def implied(self, inputs, rows, *, segment_ids, positions):
        return delta_rule_rows(inputs.q, inputs.k, inputs.g, inputs.beta, rows=rows, at=Tokens(None, segment_ids))

    def observe(self, inputs, x, *, segment_ids, positions):
        _, memory, stats = delta_rule(*inputs, at=Tokens(None, segment_ids), return_stats=True)
        return recurrent_statistics(stats, state=memory, segment_ids=segment_ids)


def _init_a_log(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """log A with A uniform in (0, 16), kept off 0."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1e-2, 16.0))


def _init_dt_bias(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Inverse softplus of a step log-uniform in [1e-3, 0.1]."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(0.1)))
    return dt + jnp.log(-jnp.expm1(-dt))
