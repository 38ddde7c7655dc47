"""Differential attention whose two maps share a base: the second form of a query or key is the first's matrix, changed at low rank."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from plait.configs.domains import Channels
from plait.models.axes import EMBED, HEADS, KV_HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.base import register
from plait.models.mixers.full.differential import LayerWeighted, LayerWeightedConfig


@register(
    "shared_diff",
    kind="full",
    source="Shared DIFF Transformer (2501.17900)",
    proof="diff with the summed matrices, three tokens by hand",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedDiffConfig(LayerWeightedConfig):
    """`diff` with `q_i = x (W_q + A_i B_i)` and `k_i = x (W_k + C_i D_i)`, i = 1, 2: one base matrix, and low-rank changes of it.

    Known of the paper here is its abstract, which names the base matrix and the low-rank updates. The rank, the start of the
    updates (as any projection, so that the two maps differ from the first step) and weight and norm (those of `diff`) are ours.
    """

    rank: Channels = 16
    """Rank of the changes."""

    @classmethod
    def example(cls) -> SharedDiffConfig:
        return cls(num_heads=4, num_kv_heads=2, head_dim=8, rank=3)

    def build(self, d_model: int, ctx: BuildContext) -> SharedDiff:
        return SharedDiff(self, d_model, ctx)


class SharedDiff(LayerWeighted):
    """See `SharedDiffConfig`."""

    def __init__(self, config: SharedDiffConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)

        def change(axis: str, heads: int) -> nnx.List:
            down = Dense(ctx, d_model, config.rank, (EMBED, None))
            return nnx.List([down, Dense(ctx, config.rank, heads * config.head_dim, (None, axis), heads=(1, heads))])

        self.q = self.projection(ctx, d_model, self.num_heads, config.head_dim)
        self.k = self.projection(ctx, d_model, self.num_kv_heads, config.head_dim, KV_HEADS)
        self.q_changes = nnx.List([change(HEADS, self.num_heads) for _ in range(2)])
        self.k_changes = nnx.List([change(KV_HEADS, self.num_kv_heads) for _ in range(2)])

    def both(self, x):
        def maps(base: Dense, changes: nnx.List, heads: int, axis: str) -> tuple[jax.Array, jax.Array]:
            shared = base(x)
            first, second = (self.split(shared + up(down(x)), heads, axis) for down, up in changes)
            return first, second

        return maps(self.q, self.q_changes, self.num_heads, HEADS), maps(self.k, self.k_changes, self.num_kv_heads, KV_HEADS)
