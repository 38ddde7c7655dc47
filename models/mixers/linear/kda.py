"""Kimi delta attention: Gated DeltaNet with a decay for every key channel."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, Self

import jax
import jax.numpy as jnp

from plait.configs.domains import Channels, Epsilon, Heads, Number, Taps
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.decays import inverse_softplus_step, log_uniform_rate
from plait.models.layers.linear import Dense
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.heads import resolve_heads
from plait.models.mixers.linear.delta import Delta, DeltaInputs
from plait.models.mixers.linear.recurrent import LowRank


@register(
    "kda",
    kind="linear",
    source="Kimi Linear: An Expressive, Efficient Attention Architecture (2510.26692)",
    proof="transformers: Kimi Linear; fla: KimiDeltaAttention",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KDAConfig(MixerConfig):
    """`S_t = (I - b_t k_t k_t^T) Diag(a_t) S_{t-1} + b_t k_t v_t^T`, `o_t = S_t^T q_t / sqrt(K)`: decayed first, then erased and written.

    `log a = -exp(A_log) softplus(W_2 W_1 x + dt_bias)`, A a head and dt_bias a channel; `b = sigmoid(W_b x)`; q, k and v are convolved, q
    and k of unit norm; the output is `W_o (norm(o) * sigmoid(G_2 G_1 x + c))`, each head normalised.
    """

    num_heads: Heads | None = None
    """Heads; None gives d_model / head_dim."""
    head_dim: Channels = 128
    """Channels of a key and of a value head."""
    rank: Channels | None = None
    """Inner width of the projections to decay and output gate; None gives head_dim."""
    full_rank: bool = False
    """Those projections have no inner width, as in Ling 3."""
    lower_bound: Annotated[float, Number(least=-20, below=0)] | None = None
    """Least log decay of a token: `log a = lower_bound sigmoid(exp(A_log) (W_2 W_1 x + dt_bias))`, A starting at 1; Kimi's safe gate has
    -5. None for the softplus, which has no bound."""
    gate: Literal["sigmoid", "silu"] | None = "sigmoid"
    """What the output gate goes through; None for no gate."""
    gate_bias: bool = True
    """Bias c of the gate's projection, which Kimi Linear and Ling 3 as published do without."""
    conv_size: Taps | None = 4
    """Taps of the short convolutions on q, k and v; None for none, whose place a silu takes."""
    negative_eigenvalues: bool = False
    """Writes with b in (0, 2) in place of (0, 1), so that the state can flip signs (arXiv 2411.12537)."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the per-head output norm."""

    def check(self) -> None:
        if self.full_rank and self.rank is not None:
            raise ValueError(f"rank={self.rank} is an inner width, which full_rank=True does without; leave one of them out")

    @classmethod
    def example(cls) -> KDAConfig:
        return cls(num_heads=4, head_dim=16)

    def heads(self, d_model: int) -> int:
        """Heads at width `d_model`."""
        return resolve_heads(self.num_heads, d_model, self.head_dim)

    def settled(self, d_model: int) -> Self:
        rank = None if self.full_rank else self.rank or self.head_dim
        return dataclasses.replace(self, num_heads=self.heads(d_model), rank=rank)

    def build(self, d_model: int, ctx: BuildContext) -> KDA:
        return KDA(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        width = self.heads(d_model) * self.head_dim
        return 6.0 * width * self.head_dim + 6.0 * (self.conv_size or 0) * width


class KDA(Delta):
    """See `KDAConfig`."""

    def __init__(self, config: KDAConfig, d_model: int, ctx: BuildContext):
        self.config = config
        self.num_heads = self.num_qk_heads = config.heads(d_model)
        self.head_dims = config.head_dim, config.head_dim
        width, rank = self.num_heads * config.head_dim, None if config.full_rank else config.rank or config.head_dim
        self.streams_in(ctx, d_model, conv_size=config.conv_size)
        self.write_gate(ctx, d_model, negative_eigenvalues=config.negative_eigenvalues)
        self.f = Dense(ctx, d_model, width, (EMBED, HEADS), role="gate") if rank is None else LowRank(ctx, d_model, rank, width)
        rate = jax.nn.initializers.zeros if config.lower_bound is not None else log_uniform_rate(1.0, 16.0)
        self.A_log = ctx.param(rate, (self.num_heads,), (HEADS,), role="decay")
        self.dt_bias = ctx.param(inverse_softplus_step(), (width,), (HEADS,), role="decay")
        self.gated_output(ctx, d_model, norm_eps=config.norm_eps, gate=config.gate, gate_rank=rank, gate_bias=config.gate_bias)

    def log_decay(self, x):
        """float32 `[B, T, H, K]`."""
        rate = jnp.exp(self.A_log[...].astype(jnp.float32))[None, None, :, None]
        step = self.heads(self.f(x).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32)[None, None])
        if self.config.lower_bound is not None:
            return self.config.lower_bound * jax.nn.sigmoid(rate * step)
        return -rate * jax.nn.softplus(step)

    def project(self, x, *, at, state):
        (q, k, v), state = self.streams(x, at=at, state=state)
        inputs = DeltaInputs(self.qk_heads(q), self.qk_heads(k), self.heads(v), self.log_decay(x), self.write_strength(x))
        return inputs, state
