"""Parallax: softmax attention less a covariance of keys and values that a learned probe reads."""

from __future__ import annotations

import dataclasses

import jax

from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.linear import Dense
from plait.models.mixers.base import register
from plait.models.mixers.full.local_linear import LocalLinear, LocalLinearConfig
from plait.models.norms import RMSNorm


@register(
    "parallax",
    kind="full",
    source="Parallax: Parameterized Local Linear Attention for Language Modeling (2605.29157)",
    proof="fla: naive_parallax",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallaxConfig(LocalLinearConfig):
    """`o_i = (sum_j p_ij v_j) (1 + sum_j p_ij r_i . k_j) - sum_j p_ij (r_i . k_j) v_j`, `p_i = softmax_j(q_i . k_j / sqrt(K))`,
    `r = W_R x`.

    That is softmax attention less `Cov_p(v, k) r`: local linear attention with a probe that is projected where `lla` solves for it. r . k
    is not scaled. W_R begins at zero, as softmax attention (under sigmaReparam, which needs a direction, like any projection). Rows sum
    to 1, weights may be negative. Keys and values are cached, probes are not.
    """

    solves = False

    def build(self, d_model: int, ctx: BuildContext) -> Parallax:
        return Parallax(self, d_model, ctx)


class Parallax(LocalLinear):
    """See `ParallaxConfig`."""

    def __init__(self, config: ParallaxConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        width = self.num_heads * config.head_dim
        zero = jax.nn.initializers.zeros if ctx.sigma_reparam is None else None
        self.r = Dense(ctx, d_model, width, (EMBED, HEADS), init=zero, heads=(1, self.num_heads))
        self.r_norm = RMSNorm(ctx, config.head_dim, eps=1e-6) if config.qk_norm else None

    def probe(self, x, at):
        return self.turned(self.r, self.r_norm, x, at)
