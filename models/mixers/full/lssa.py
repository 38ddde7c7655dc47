"""Length-scaled softplus attention, and its re-weighting (LSSAR)."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from plait.configs.domains import Whole
from plait.kernels.shapes import l2_normalize
from plait.kernels.weighted_attention import Rule, dot_products, over_sum
from plait.models.build import BuildContext
from plait.models.mixers.base import register
from plait.models.mixers.full.by_rule import ByRule, RuleConfig

EARLY = 3
"""Rows from which nothing is subtracted: of so few keys none may stand out from the mean."""
UNIFORM = 1e-5
"""How far above the mean the largest weight of a row is by rounding alone."""


@register(
    "lssa",
    kind="full",
    source="Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models (2501.13428)",
    proof="the formula in float64, and 3 tokens by hand",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LSSAConfig(RuleConfig):
    """`A_ij = softplus(log K log N_i q_i . k_j) / sum_j`, q and k of norm 1, `N_i` the keys that query i sees (i + 1 in its document).

    With `power` p (LSSAR) the weights are sharpened: `A'_ij = relu(N_i A_ij - O_i)^p / sum_j`, `O_i` = 0 in a document's first three rows
    and 1 after them. The power is of float32 weights over the largest of their row, which changes nothing but what overflows. A row in
    which no key stands out from the mean would be all zeros under O = 1; it keeps O = 0, so that every row sums to 1.
    """

    power: Annotated[int, Whole(1, 64)] | None = None
    """Exponent p of the re-weighting; 15 is LSSAR as published, None is LSSA."""

    def build(self, d_model: int, ctx: BuildContext) -> LSSA:
        return LSSA(self, d_model, ctx, ScaledSoftplus(self.power))


@dataclasses.dataclass(frozen=True)
class ScaledSoftplus(Rule):
    """See `LSSAConfig`."""

    power: int | None

    def __call__(self, q, k, parameters, seen):
        count = seen.num_keys()
        temperature = math.log(q.shape[-1]) * jnp.log(jnp.maximum(count, 1))
        a = over_sum(jnp.where(seen.visible, jax.nn.softplus(temperature * dot_products(q, k, seen)), 0))
        if self.power is None:
            return a
        shares = count * a  # 1 on the mean
        offset = jnp.where((count > EARLY) & (jnp.max(shares, axis=-1, keepdims=True) > 1 + UNIFORM), 1, 0)
        above = jax.nn.relu(shares - offset)
        largest = jax.lax.stop_gradient(jnp.max(above, axis=-1, keepdims=True))
        return over_sum((above / jnp.where(largest > 0, largest, 1)) ** self.power)


class LSSA(ByRule):
    """See `LSSAConfig`."""

    def prepared(self, q, k, *, at):
        q, k = super().prepared(q, k, at=at)
        return l2_normalize(q), l2_normalize(k)
