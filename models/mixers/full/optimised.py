"""Optimised attention: values are slices of the input."""

from __future__ import annotations

import dataclasses

from plait.models.build import BuildContext
from plait.models.mixers.base import register
from plait.models.mixers.full.dot_product import DotProduct, PlacedConfig
from plait.models.mixers.full.weighted import QKV


@register(
    "optimised",
    kind="full",
    source="Cost-Effective Attention Mechanisms for Low Resource Settings (2403.01643)",
    proof="softmax attention whose value projection is the identity, and the parameters counted",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimisedConfig(PlacedConfig):
    """`o_h = softmax(Q_h K_h^T / sqrt(K)) x_h` with `x_h` the h-th slice of the input: W_O makes up for W_V, which is left out.

    3/4 of the parameters of multi-head attention, one product fewer. Keys are turned here; the paper adds positions to the embeddings.
    """

    @classmethod
    def example(cls) -> OptimisedConfig:
        return cls(num_heads=4, head_dim=16)

    def count_heads(self, d_model: int) -> int:
        heads = super().count_heads(d_model)
        if heads * self.head_dim != d_model:
            raise ValueError(
                f"head_dim={self.head_dim} times {heads} heads must be d_model={d_model}, of which the values are slices; "
                "use num_heads=None and a head_dim that divides it"
            )
        return heads

    def build(self, d_model: int, ctx: BuildContext) -> Optimised:
        return Optimised(self, d_model, ctx)


class Optimised(DotProduct):
    """See `OptimisedConfig`."""

    def __init__(self, config: OptimisedConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.num_kv_heads = self.num_heads
        self.q, self.k = (self.projection(ctx, d_model, self.num_heads, config.head_dim) for _ in range(2))
        self.o = self.projection_back(ctx, d_model, config.head_dim)

    def project(self, x, *, at, state):
        placed = self.placed(x, at)
        q, k = (self.turned(self.split(dense(placed), self.num_heads), at) for dense in (self.q, self.k))
        return QKV(q, k, self.split(x.astype(self.dtype), self.num_heads)), state
