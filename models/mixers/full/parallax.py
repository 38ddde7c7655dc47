"""Parallax: softmax attention less a covariance of keys and values that a learned probe reads."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from plait.kernels.weighted_attention import Rule, dot_products, softmax
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.layers.norms import RMSNorm
from plait.models.mixers.base import Direction, register
from plait.models.mixers.full.by_rule import ByRule, RuleConfig
from plait.models.mixers.full.lla import corrected


@register(
    "parallax",
    kind="full",
    source="Parallax: Parameterized Local Linear Attention for Language Modeling (2605.29157)",
    proof="fla: naive_parallax",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallaxConfig(RuleConfig):
    """`o_i = (sum_j p_ij v_j) (1 + sum_j p_ij r_i . k_j) - sum_j p_ij (r_i . k_j) v_j`, `p_i = softmax_j(q_i . k_j / sqrt(K))`,
    `r = W_R x`.

    That is softmax attention less `Cov_p(v, k) r`: local linear attention with a probe that is projected where `lla` solves for it. r . k
    is not scaled. W_R begins at zero, as softmax attention (under sigmaReparam, which needs a direction, like any projection). Rows sum
    to 1, weights may be negative. Keys and values are cached, probes are not.
    """

    directions: ClassVar[tuple[Direction, ...]] = ("causal", "bidirectional")

    qk_norm: bool = False
    """RMS-normalise queries, keys and probes per head before their positions turn them, with a learned gain."""

    def pair_flops(self) -> float:
        return 6.0 * self.head_dim

    def build(self, d_model: int, ctx: BuildContext) -> Parallax:
        return Parallax(self, d_model, ctx)


@dataclasses.dataclass(frozen=True)
class Probed(Rule):
    """See `ParallaxConfig`; a query's probe is behind it, `[B, R, H, 2 K]`."""

    def __call__(self, q, k, parameters, seen):
        q, r = jnp.split(q, 2, axis=-1)
        return corrected(softmax(q.shape[-1] ** -0.5 * dot_products(q, k, seen), seen.visible), r, k, seen)


class Parallax(ByRule):
    """See `ParallaxConfig`."""

    def __init__(self, config: ParallaxConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx, Probed())
        zero = jax.nn.initializers.zeros if ctx.sigma_reparam is None else None
        width = self.num_heads * config.head_dim
        self.r = Dense(ctx, d_model, width, (EMBED, HEADS), init=zero, heads=(1, self.num_heads))
        self.q_norm, self.k_norm, self.r_norm = (
            RMSNorm(ctx, config.head_dim, eps=1e-6) if config.qk_norm else None for _ in range(3)
        )

    def project(self, x, *, at, state):
        inputs, state = super().project(x, at=at, state=state)
        r = self.split(self.r(self.placed(x, at)), self.num_heads)
        r = self.turned(r if self.r_norm is None else self.r_norm(r), at)
        return inputs._replace(q=jnp.concatenate([inputs.q, r], axis=-1)), state

    def prepared(self, q, k, *, at):
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return super().prepared(q, k, at=at)
