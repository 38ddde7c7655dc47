"""ReLU attention: each weight on its own, over the number of keys."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from plait.kernels.weighted_attention import Rule, dot_products
from plait.models.build import BuildContext
from plait.models.mixers.base import Direction, register
from plait.models.mixers.full.by_rule import ByRule, RuleConfig


@register(
    "relu_attention",
    kind="full",
    source="Replacing softmax with ReLU in Vision Transformers (2309.08586)",
    proof="the formula in float64, and 3 tokens by hand",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReluAttentionConfig(RuleConfig):
    """`A_ij = relu(q_i . k_j / sqrt(K)) / L_i`, `L_i` the keys that query i sees: i + 1 in a causal document, its length otherwise.

    The paper divides by the length of an image's sequence; dividing each causal row by what it sees is Bigram-Backcopy's (2410.13835).
    """

    directions: ClassVar[tuple[Direction, ...]] = ("causal", "bidirectional")

    @classmethod
    def example(cls) -> ReluAttentionConfig:
        return cls(num_heads=8, head_dim=8)  # one of few heads may well look nowhere

    def build(self, d_model: int, ctx: BuildContext) -> ByRule:
        return ByRule(self, d_model, ctx, ReluOverLength())


@dataclasses.dataclass(frozen=True)
class ReluOverLength(Rule):
    """`relu(p) / L`."""

    def __call__(self, q, k, parameters, seen):
        p = q.shape[-1] ** -0.5 * dot_products(q, k, seen)
        return jnp.where(seen.visible, jax.nn.relu(p), 0) / jnp.maximum(seen.num_keys(), 1)
