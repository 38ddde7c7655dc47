"""MALA: linear attention whose weights sum to 1 and keep what the length of a query says."""

from __future__ import annotations

import dataclasses

from plait.models.build import BuildContext
from plait.models.mixers.base import register
from plait.models.mixers.linear.feature_attention import Weights
from plait.models.mixers.linear.lepe_attention import LepeAttention, LepeConfig


@register(
    "mala",
    kind="linear",
    source="Rectifying Magnitude Neglect in Linear Attention (2507.00698)",
    proof="the authors' AddLinearAttention",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MALAConfig(LepeConfig):
    """`A_ij = (1 + 1 / z_i) f(q_i) . f(k_j) / (sqrt(K) N) - z_i / N`, `z_i = f(q_i) . mean_j f(k_j) / sqrt(K)`, `f(x) = elu(x) + 1`.

    N counts the tokens j that i sees. Weights may be negative. f(q) and f(k) are rotated in the first term only; without rotation a
    row sums to 1. The output is `W_o ((A v + LePE(v)) * W_g x)`. Published bidirectional; causal, sums and N end at the token.
    """

    def sums(self, d_model: int) -> dict[str, tuple[int, int]]:
        return {"memory": (self.head_dim, self.head_dim), "keys": (self.head_dim, 1), "values": (1, self.head_dim)}

    def build(self, d_model: int, ctx: BuildContext) -> MALA:
        return MALA(self, d_model, ctx)


class MALA(LepeAttention):
    """See `MALAConfig`."""

    def weigh(self, inputs, sums):
        scale = self.config.head_dim**-0.5 / sums.count
        z = scale * sums.mass("keys", inputs.q, inputs.k)
        return Weights((1 + 1 / (z + 1e-6)) * scale * inputs.q_turned, inputs.k_turned, -z / sums.count)
