"""Optimised attention: values are slices of the input."""

from __future__ import annotations

import dataclasses

from plait.configs.domains import Base, Channels
from plait.models.axes import BATCH, EMBED, HEADS, LENGTH, constrain
from plait.models.build import BuildContext
from plait.models.linear import Dense
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.full.weighted import QKV, Cached, mean_keys
from plait.models.mixers.heads import join_heads, require_divides, split_heads
from plait.models.rope import rotate


@register(
    "optimised",
    kind="full",
    source="Cost-Effective Attention Mechanisms for Low Resource Settings (2403.01643)",
    proof="softmax attention whose value projection is the identity, and the parameters counted",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimisedConfig(MixerConfig):
    """`o_h = softmax(Q_h K_h^T / sqrt(K)) x_h` with `x_h` the h-th slice of the input: W_O makes up for W_V, which is left out.

    3/4 of the parameters of multi-head attention, one product fewer. Keys are rotated here; the paper adds positions to the embeddings.
    """

    head_dim: Channels = 64
    """Channels of a head, and of the slices of the input; there are d_model / head_dim heads."""
    rope_theta: Base | None = 10_000.0
    """Base of the rotary embedding; None for no position encoding (NoPE)."""

    directions = ("causal", "bidirectional")

    def check(self) -> None:
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even where rope_theta={self.rope_theta} rotates channels in pairs; "
                f"use {self.head_dim + 1}, or rope_theta=None for NoPE"
            )

    @classmethod
    def example(cls) -> OptimisedConfig:
        return cls(head_dim=16)

    def heads(self, d_model: int) -> int:
        """Heads at width `d_model`."""
        require_divides(("head_dim", self.head_dim), ("d_model", d_model))
        return d_model // self.head_dim

    def build(self, d_model: int, ctx: BuildContext) -> Optimised:
        return Optimised(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return 4.0 * self.heads(d_model) * self.head_dim * mean_keys(seq_len)


class Optimised(Cached):
    """See `OptimisedConfig`."""

    def __init__(self, config: OptimisedConfig, d_model: int, ctx: BuildContext):
        super().__init__(ctx)
        self.config, self.num_heads = config, config.heads(d_model)
        self.q = Dense(ctx, d_model, d_model, (EMBED, HEADS), heads=(1, self.num_heads))
        self.k = Dense(ctx, d_model, d_model, (EMBED, HEADS), heads=(1, self.num_heads))
        self.o = Dense(ctx, d_model, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads))

    def project(self, x, *, at, state):
        parts = (self.q(x), self.k(x), x.astype(self.dtype))
        q, k, v = (constrain(split_heads(y, self.num_heads), (BATCH, LENGTH, HEADS, None)) for y in parts)
        if self.config.rope_theta is not None:
            q, k = (rotate(y, at.positions, self.config.rope_theta) for y in (q, k))
        return QKV(q, k, v), state

    def entries(self):
        one = ((self.num_heads, self.config.head_dim), HEADS)
        return {"k": one, "v": one}

    def output(self, o):
        return self.o(join_heads(o))
