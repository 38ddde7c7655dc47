"""Hedgehog: linear attention with a learned map of softmaxes that mimics softmax attention."""

from __future__ import annotations

import dataclasses
from typing import Literal

from plait.configs.domains import Base, Channels, Heads
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.base import register
from plait.models.mixers.heads import resolve_heads
from plait.models.mixers.linear.feature_attention import FeatureAttention, FeatureConfig, Features
from plait.models.mixers.linear.feature_maps import SoftmaxMap
from plait.models.positions.rope import rotate


@register(
    "hedgehog",
    kind="linear",
    source="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry (2402.04347)",
    proof="fla: HedgehogFeatureMap on naive_recurrent_linear_attn; both normalisations by hand",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class HedgehogConfig(FeatureConfig):
    """`o_i = sum_j A_ij v_j / sum_j A_ij`, `A_ij = f(q_i) . g(k_j)`, `f(x) = [softmax(W x), softmax(-W x)]`.

    Softmaxes are over channels; each head has its W, queries and keys different ones, all starting at the identity. q and k are rotated
    before the map, as the softmax attention that it mimics.
    """

    num_heads: Heads | None = None
    """Heads; None gives d_model / head_dim."""
    head_dim: Channels = 64
    """Channels of a head; its map has twice as many."""
    softmax: Literal["separate", "joint"] = "separate"
    """`separate`: one softmax for each sign (LoLCATs, arXiv 2410.10254). `joint`: one over both, of 2 W x + 2 b and its negative (fla).
    They are different maps."""
    rope_theta: Base | None = 10_000.0
    """Base of the rotary embedding; None for no position encoding."""

    def check(self) -> None:
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even where rope_theta={self.rope_theta} rotates channels in pairs; "
                f"use {self.head_dim + 1}, or rope_theta=None"
            )

    @classmethod
    def example(cls) -> HedgehogConfig:
        return cls(num_heads=4, head_dim=16)

    def heads(self, d_model: int) -> int:
        return resolve_heads(self.num_heads, d_model, self.head_dim)

    def sums(self, d_model: int) -> dict[str, tuple[int, int]]:
        return {"memory": (2 * self.head_dim, self.head_dim + 1)}

    def build(self, d_model: int, ctx: BuildContext) -> Hedgehog:
        return Hedgehog(self, d_model, ctx)


class Hedgehog(FeatureAttention):
    """See `HedgehogConfig`."""

    normalize = True

    def __init__(self, config: HedgehogConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.rope_theta = config.rope_theta
        width = self.num_heads * config.head_dim
        self.q, self.k, self.v = (Dense(ctx, d_model, width, (EMBED, HEADS), heads=(1, self.num_heads)) for _ in range(3))
        joint = config.softmax == "joint"
        self.q_map, self.k_map = (SoftmaxMap(ctx, self.num_heads, config.head_dim, joint=joint) for _ in range(2))
        self.o = Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads))

    def project(self, x, *, at, state):
        q, k, v = (self.heads(dense(x)) for dense in (self.q, self.k, self.v))
        if self.rope_theta is not None:
            q, k = (rotate(y, at.positions, self.rope_theta) for y in (q, k))
        return Features(self.q_map(q), self.k_map(k), v), state
