"""Local linear attention: at every query, the linear regression of values on the keys near it."""

from __future__ import annotations

import dataclasses

from plait.configs.domains import Coefficient
from plait.models.build import BuildContext
from plait.models.mixers.base import register
from plait.models.mixers.full.local_linear import LocalLinear, LocalLinearConfig


@register(
    "lla",
    kind="full",
    source="Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For Test-Time Regression (2510.01450)",
    proof="the paper's closed form and weighted least squares in float64",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LLAConfig(LocalLinearConfig):
    """`o_i = sum_j w_ij (1 - z_ij . rho_i) v_j / (sum_j w_ij - mu_i . rho_i)`, `w_ij = exp(q_i . k_j / sqrt(K))`, `z_ij = k_j - q_i`,
    `mu_i = sum_j w_ij z_ij`, `rho_i = (sum_j w_ij z_ij z_ij^T + ridge I)^-1 mu_i`.

    Rows sum to 1, weights may be negative. A large ridge gives softmax attention, a small one outputs that are exact where values are affine
    in the keys. It costs O(T^2 K^2): a solve of K equations for every query, in float32 whatever the inputs. Keys and values are cached.
    The ridge counts relative to the largest weight of a row, which the paper leaves open.
    """

    solves = True

    ridge: Coefficient = 10.0
    """What regularises the regression, which fewer tokens than channels leave open; the default of the released kernels."""

    def build(self, d_model: int, ctx: BuildContext) -> LLA:
        return LLA(self, d_model, ctx)


class LLA(LocalLinear):
    """See `LLAConfig`."""

    def __init__(self, config: LLAConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.ridge = config.ridge
