"""Differential attention, second form: twice the queries on plain keys and values, and a weight from every token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from plait.models.axes import EMBED, HEADS, KV_HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.base import register
from plait.models.mixers.full.differential import Differential, Pairs
from plait.models.mixers.full.dot_product import GroupedConfig


@register(
    "diff_v2",
    kind="full",
    source="Differential Transformer V2 (microsoft/unilm, Diff-Transformer-V2)",
    proof="the authors' layer",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffV2Config(GroupedConfig):
    """`o_h = (softmax(q_2h k^T / sqrt(K)) - sigmoid(x W)_h softmax(q_2h+1 k^T / sqrt(K))) v`.

    Both queries of a head use one key and value; there is no norm, and no weight that depends on the layer.
    """

    @classmethod
    def example(cls) -> DiffV2Config:
        return cls(num_heads=4, num_kv_heads=2, head_dim=16)

    def maps(self, d_model: int) -> tuple[int, int, int]:
        return 2 * self.count_heads(d_model), self.head_dim, self.head_dim

    def build(self, d_model: int, ctx: BuildContext) -> DiffV2:
        return DiffV2(self, d_model, ctx)


class DiffV2(Differential):
    """See `DiffV2Config`. Queries of a head stand side by side, so that they are in one group of keys and values."""

    def __init__(self, config: DiffV2Config, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        _, self.num_kv_heads = config.heads(d_model)
        self.groups = self.num_heads
        self.q = self.projection(ctx, d_model, 2 * self.num_heads, config.head_dim)
        self.k, self.v = (self.projection(ctx, d_model, self.num_kv_heads, config.head_dim, KV_HEADS) for _ in range(2))
        self.weight = Dense(ctx, d_model, self.num_heads, (EMBED, HEADS), role="gate")
        self.o = self.projection_back(ctx, d_model, config.head_dim)

    def project(self, x, *, at, state):
        placed = self.placed(x, at)
        q = self.turned(self.split(self.q(placed), 2 * self.num_heads), at)
        k = self.turned(self.split(self.k(placed), self.num_kv_heads, KV_HEADS), at)
        v = self.split(self.v(x), self.num_kv_heads, KV_HEADS)
        return Pairs(q, k, v, jax.nn.sigmoid(self.weight(x).astype(jnp.float32))), state
