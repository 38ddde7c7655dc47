"""Differential attention, first form: two softmax maps a head, whose difference cancels what both look at."""

from __future__ import annotations

import dataclasses

from plait.models.axes import KV_HEADS
from plait.models.build import BuildContext
from plait.models.mixers.base import register
from plait.models.mixers.full.differential import LayerWeighted, LayerWeightedConfig


@register(
    "diff",
    kind="full",
    source="Differential Transformer (2410.05258)",
    proof="transformers: DiffLlama",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffConfig(LayerWeightedConfig):
    """`o = (1 - w_l) norm((softmax(q_1 k_1^T / sqrt(K)) - weight softmax(q_2 k_2^T / sqrt(K))) v)`, v of 2K channels.

    `weight = exp(a_1 . b_1) - exp(a_2 . b_2) + w_l` is learned, one a layer; `w_l = 0.8 - 0.6 exp(-0.3 l)` in layer l from 0 on.
    With grouped heads both maps of a head use the two keys of its group, as in the authors' kernels.
    """

    @classmethod
    def example(cls) -> DiffConfig:
        return cls(num_heads=4, num_kv_heads=2, head_dim=8)

    def build(self, d_model: int, ctx: BuildContext) -> Diff:
        return Diff(self, d_model, ctx)


class Diff(LayerWeighted):
    """See `DiffConfig`. The projections hold the two maps of a head side by side."""

    def __init__(self, config: DiffConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.q = self.projection(ctx, d_model, 2 * self.num_heads, config.head_dim)
        self.k = self.projection(ctx, d_model, 2 * self.num_kv_heads, config.head_dim, KV_HEADS)

    def both(self, x):
        q = self.split(self.q(x), 2 * self.num_heads)
        k = self.split(self.k(x), 2 * self.num_kv_heads, KV_HEADS)
        return (q[:, :, 0::2], q[:, :, 1::2]), (k[:, :, 0::2], k[:, :, 1::2])
