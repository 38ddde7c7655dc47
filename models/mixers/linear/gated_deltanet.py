"""Gated DeltaNet: a decaying state that overwrites what it stored under a key."""

from __future__ import annotations

import dataclasses
from typing import Self

from plait.configs.domains import Channels, Epsilon, Factor, Heads, Taps
from plait.models.build import BuildContext
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.heads import expanded, expansion, require_divides
from plait.models.mixers.linear.delta import Delta, DeltaInputs


@register(
    "gated_deltanet",
    kind="linear",
    source="Gated Delta Networks (2412.06464)",
    proof="transformers: Qwen3-Next, OLMo-hybrid",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(MixerConfig):
    """`S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T`, `o_t = S_t^T q_t / sqrt(K)`.

    `log a = -exp(A_log) softplus(W_a x + dt_bias)`, `b = sigmoid(W_b x)`; q, k and v are convolved, q and k of unit norm; the output is
    `W_o (norm(o) * silu(W_g x))`, each head normalised. The state decays before the prediction of v_t is taken from it. Qwen3-Next has
    more value heads than keys (`num_v_heads`), OLMo-hybrid `negative_eigenvalues`.
    """

    num_heads: Heads | None = None
    """Query and key heads; None gives the published 3/4 d_model / head_dim."""
    num_v_heads: Heads | None = None
    """Value heads, a multiple of num_heads; None gives num_heads."""
    head_dim: Channels = 256
    """Channels of a query and key head."""
    expand_v: Factor = 2.0
    """Channels of a value head over head_dim."""
    conv_size: Taps | None = 4
    """Taps of the short convolutions on q, k and v; None for none, whose place a silu takes."""
    gate: bool = True
    """Whether the normalised heads are gated by `silu(W_g x)`."""
    negative_eigenvalues: bool = False
    """Writes with b in (0, 2) in place of (0, 1), so that the state can flip signs (arXiv 2411.12537)."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the per-head output norm."""

    def check(self) -> None:
        expanded(self.expand_v, self.head_dim, name="expand_v", of="head_dim")

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

    def settled(self, d_model: int) -> Self:
        num_heads, num_v_heads = self.heads(d_model)
        expand_v = expansion(self.head_v_dim, self.head_dim)
        return dataclasses.replace(self, num_heads=num_heads, num_v_heads=num_v_heads, expand_v=expand_v)

    @property
    def head_v_dim(self) -> int:
        """Channels of a value head."""
        return int(self.head_dim * self.expand_v)

    def build(self, d_model: int, ctx: BuildContext) -> GatedDeltaNet:
        return GatedDeltaNet(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        num_heads, num_v_heads = self.heads(d_model)
        convolved = 2 * num_heads * self.head_dim + num_v_heads * self.head_v_dim
        return 6.0 * num_v_heads * self.head_dim * self.head_v_dim + 2.0 * (self.conv_size or 0) * convolved


class GatedDeltaNet(Delta):
    """See `GatedDeltaNetConfig`. Heads of the contract are the value heads."""

    def __init__(self, config: GatedDeltaNetConfig, d_model: int, ctx: BuildContext):
        self.config = config
        self.num_qk_heads, self.num_heads = config.heads(d_model)
        self.head_dims = config.head_dim, config.head_v_dim
        self.streams_in(ctx, d_model, conv_size=config.conv_size)
        self.head_gates(ctx, d_model, negative_eigenvalues=config.negative_eigenvalues)
        self.gated_output(ctx, d_model, norm_eps=config.norm_eps, gate="silu" if config.gate else None)

    def project(self, x, *, at, state):
        (q, k, v), state = self.streams(x, at=at, state=state)
        inputs = DeltaInputs(self.qk_heads(q), self.qk_heads(k), self.heads(v), self.log_decay(x), self.write_strength(x))
        return inputs, state
