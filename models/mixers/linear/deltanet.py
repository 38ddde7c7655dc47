"""DeltaNet: a state that overwrites what it stored under a key, and forgets nothing else."""

from __future__ import annotations

import dataclasses
from typing import Self

from plait.configs.domains import Channels, Epsilon, Heads, Taps
from plait.models.build import BuildContext
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.heads import resolve_heads
from plait.models.mixers.linear.delta import Delta, DeltaInputs


@register(
    "deltanet",
    kind="linear",
    source="Parallelizing Linear Transformers with the Delta Rule over Sequence Length (2406.06484)",
    proof="fla: DeltaNet on delta_rule_recurrence",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(MixerConfig):
    """`S_t = S_{t-1} + b_t k_t (v_t - S_{t-1}^T k_t)^T`, `o_t = S_t^T q_t / sqrt(K)`, `b = sigmoid(W_b x)`.

    q, k and v are convolved, q and k of unit norm (which makes each step a contraction), and each head is normalised.
    """

    num_heads: Heads | None = None
    """Heads; None gives d_model / head_dim."""
    head_dim: Channels = 128
    """Channels of a key and of a value head."""
    conv_size: Taps | None = 4
    """Taps of the short convolutions on q, k and v, which the paper finds essential; None for none, whose place a silu takes."""
    gate: bool = False
    """Whether the normalised heads are gated by `silu(W_g x)`."""
    negative_eigenvalues: bool = False
    """Writes with b in (0, 2) in place of (0, 1), so that the state can flip signs (arXiv 2411.12537)."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the per-head output norm."""

    @classmethod
    def example(cls) -> DeltaNetConfig:
        return cls(num_heads=4, head_dim=16)

    def heads(self, d_model: int) -> int:
        """Heads at width `d_model`."""
        return resolve_heads(self.num_heads, d_model, self.head_dim)

    def settled(self, d_model: int) -> Self:
        return dataclasses.replace(self, num_heads=self.heads(d_model))

    def build(self, d_model: int, ctx: BuildContext) -> DeltaNet:
        return DeltaNet(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        width = self.heads(d_model) * self.head_dim
        return 6.0 * width * self.head_dim + 6.0 * (self.conv_size or 0) * width


class DeltaNet(Delta):
    """See `DeltaNetConfig`."""

    def __init__(self, config: DeltaNetConfig, d_model: int, ctx: BuildContext):
        self.config = config
        self.num_heads = self.num_qk_heads = config.heads(d_model)
        self.head_dims = config.head_dim, config.head_dim
        self.streams_in(ctx, d_model, conv_size=config.conv_size)
        self.write_gate(ctx, d_model, negative_eigenvalues=config.negative_eigenvalues)
        self.gated_output(ctx, d_model, norm_eps=config.norm_eps, gate="silu" if config.gate else None)

    def project(self, x, *, at, state):
        (q, k, v), state = self.streams(x, at=at, state=state)
        return DeltaInputs(self.qk_heads(q), self.qk_heads(k), self.heads(v), None, self.write_strength(x)), state
