"""Local linear attention: at every query, the linear regression of values on the keys near it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from plait.configs.domains import Coefficient
from plait.kernels.positive_solve import positive_solve
from plait.kernels.weighted_attention import Rule, Seen, dot_products, softmax
from plait.models.build import BuildContext
from plait.models.mixers.base import Direction, register
from plait.models.mixers.full.by_rule import ByRule, RuleConfig


@register(
    "lla",
    kind="full",
    source="Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For Test-Time Regression (2510.01450)",
    proof="the paper's closed form, and weighted least squares, in float64",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LLAConfig(RuleConfig):
    """`o_i = sum_j w_ij (1 - z_ij . rho_i) v_j / (sum_j w_ij - mu_i . rho_i)`, `w_ij = exp(q_i . k_j / sqrt(K))`, `z_ij = k_j - q_i`,
    `mu_i = sum_j w_ij z_ij`, `rho_i = (sum_j w_ij z_ij z_ij^T + ridge I)^-1 mu_i`.

    Rows sum to 1, weights may be negative. A large ridge gives softmax attention, a small one outputs that are exact where values are affine
    in the keys. Work is O(T^2 K^2), with a solve of K equations for every query, in float32 whatever the inputs; memory is linear in T.
    The ridge counts relative to the largest weight of a row, so that large logits do not undo it; the paper leaves that open.
    """

    directions: ClassVar[tuple[Direction, ...]] = ("causal", "bidirectional")

    ridge: Coefficient = 10.0
    """What regularises the regression, which fewer tokens than channels leave open; the default of the released kernels."""

    def pair_flops(self) -> float:
        return 2.0 * (self.head_dim**2 + 4 * self.head_dim)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        solve = 2.0 * self.head_dim**3 * self.heads(d_model)[0]
        return super().mixing_flops(d_model, seq_len) + solve

    def build(self, d_model: int, ctx: BuildContext) -> ByRule:
        return ByRule(self, d_model, ctx, LocalRegression(self.ridge))


def corrected(p: jax.Array, r: jax.Array, k: jax.Array, seen: Seen) -> jax.Array:
    """The weights of `E v - Cov(v, k) r`, mean and covariance under weights `p` `[B, H, R, S]`; `r` `[B, R, H, K]` is a row's own."""
    tilt = dot_products(r, k, seen)
    return p * (1 + jnp.sum(p * tilt, axis=-1, keepdims=True) - tilt)


@dataclasses.dataclass(frozen=True)
class LocalRegression(Rule):
    """See `LLAConfig`. With `p = w / sum w` and means and covariances under p, the paper's weights are those of
    `o = E v - Cov(v, k) r`, `r = (Cov(k, k) + ridge max p I)^-1 (E k - q)`.

    For the paper's matrix over `sum w` is the inverted one plus `d d^T`, `d = E k - q`; by Sherman and Morrison `rho = r / (1 + d . r)`,
    and its denominator is `sum w / (1 + d . r)`. A query far from all keys does not make this solve worse.
    """

    ridge: float

    def __call__(self, q, k, parameters, seen):
        p = softmax(q.shape[-1] ** -0.5 * dot_products(q, k, seen), seen.visible)
        q, k, exact = q.astype(p.dtype), k.astype(p.dtype), seen._replace(precision="highest")
        return corrected(p, self.slope(p, q, k), k, exact)

    def slope(self, p: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
        """r `[B, R, H, K]`."""
        batch, num_heads, rows, num_keys = p.shape
        grouped = p.reshape(batch, k.shape[2], -1, num_keys)  # [B, Hkv, heads of a group * R, S]
        mean = jnp.einsum("bgns,bsgk->bgnk", grouped, k, precision="highest")

        def centred(channel: tuple[jax.Array, jax.Array]) -> jax.Array:
            """Covariances `[B, Hkv, N, K]` of one channel with all, so that nothing of S x K x K exists."""
            of_keys, of_mean = channel  # [B, S, Hkv], [B, Hkv, N]
            away = grouped * (jnp.moveaxis(of_keys, 1, 2)[:, :, None] - of_mean[..., None])
            left = away.sum(-1, keepdims=True)  # 0 but for rounding, which large keys would multiply
            return jnp.einsum("bgns,bsgk->bgnk", away, k, precision="highest") - left * mean

        covariance = jnp.moveaxis(jax.lax.map(centred, (jnp.moveaxis(k, -1, 0), jnp.moveaxis(mean, -1, 0))), 0, -1)
        largest = jnp.max(grouped, axis=-1)[..., None, None]
        ridge = self.ridge * jnp.where(largest > 0, largest, 1)  # a row that sees nothing has no weights
        unit = jnp.eye(k.shape[-1], dtype=p.dtype)[None, None, None]
        d = mean.reshape(batch, num_heads, rows, -1) - jnp.swapaxes(q, 1, 2)
        r = positive_solve((covariance + jnp.swapaxes(covariance, -1, -2)) / 2 + ridge * unit, d.reshape(mean.shape))
        return jnp.swapaxes(r.reshape(d.shape), 1, 2)
