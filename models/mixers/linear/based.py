"""Based: linear attention whose weights are the exponential's second-order Taylor polynomial."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from plait.configs.domains import Channels, Heads
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.base import register
from plait.models.mixers.heads import require_divides
from plait.models.mixers.linear.feature_attention import FeatureAttention, FeatureConfig, Features
from plait.models.mixers.linear.feature_maps import num_pairs, taylor


@register(
    "based",
    kind="linear",
    source="Simple linear attention language models balance the recall-throughput tradeoff (2402.18668)",
    proof="the authors' LinearAttention",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class BasedConfig(FeatureConfig):
    """`o_i = sum_j A_ij v_j / (sum_j A_ij + 1e-12)`, `A_ij = 1 + s + s^2 / 2`, `s = q_i . k_j / sqrt(feature_dim)`.

    A is at least 1/2. The published models alternate it with gated convolutions (`base_conv`) and softmax attention in windows.
    """

    num_heads: Heads = 16
    """Heads; values have d_model / num_heads channels."""
    feature_dim: Channels = 16
    """Channels of a query and key head before the feature map."""
    packing: Literal["symmetric", "outer"] = "symmetric"
    """Second-order features kept: each product once (153 features of 16 channels) or, as first published, twice (273); equal outputs."""

    @classmethod
    def example(cls) -> BasedConfig:
        return cls(num_heads=4, feature_dim=4)

    def heads(self, d_model: int) -> int:
        require_divides(("num_heads", self.num_heads), ("d_model", d_model))
        return self.num_heads

    def sums(self, d_model: int) -> dict[str, tuple[int, int]]:
        features = 1 + self.feature_dim + num_pairs(self.feature_dim, symmetric=self.packing == "symmetric")
        return {"memory": (features, d_model // self.heads(d_model) + 1)}

    def build(self, d_model: int, ctx: BuildContext) -> Based:
        return Based(self, d_model, ctx)


class Based(FeatureAttention):
    """See `BasedConfig`."""

    normalize = True

    def __init__(self, config: BasedConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.symmetric = config.packing == "symmetric"
        widths = self.num_heads * config.feature_dim, self.num_heads * config.feature_dim, d_model
        self.q, self.k, self.v = (Dense(ctx, d_model, width, (EMBED, HEADS), heads=(1, self.num_heads)) for width in widths)
        self.o = Dense(ctx, d_model, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads))

    def project(self, x, *, at, state):
        q, k = (taylor(self.heads(dense(x)).astype(jnp.float32), symmetric=self.symmetric) for dense in (self.q, self.k))
        return Features(q, k, self.heads(self.v(x))), state
