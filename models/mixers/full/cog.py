"""Cog attention: weights that may be negative."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from plait.kernels.weighted_attention import Rule, dot_products, softmax
from plait.models.build import BuildContext
from plait.models.mixers.base import Direction, register
from plait.models.mixers.full.by_rule import ByRule, RuleConfig


@register(
    "cog",
    kind="full",
    source="More Expressive Attention with Negative Weights (2411.07176)",
    proof="the authors' layer, outputs and gradients",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CogConfig(RuleConfig):
    """`p_ij = q_i . k_j / sqrt(K)`, `A_ij = sign(p_ij) softmax_j |p_ij|`: what a row takes from its keys and from minus them sums to 1.

    The sign has no gradient; all of it flows through the softmax. The paper's models keep softmax attention in their first and last
    layers: `"softmax@0,11; cog"`.
    """

    directions: ClassVar[tuple[Direction, ...]] = ("causal", "bidirectional")

    def build(self, d_model: int, ctx: BuildContext) -> ByRule:
        return ByRule(self, d_model, ctx, SignedSoftmax())


@dataclasses.dataclass(frozen=True)
class SignedSoftmax(Rule):
    """`sign(p) softmax |p|`."""

    def __call__(self, q, k, parameters, seen):
        p = q.shape[-1] ** -0.5 * dot_products(q, k, seen)
        return jnp.sign(p) * softmax(jnp.abs(p), seen.visible)
