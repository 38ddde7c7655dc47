"""Moneta: a memory that minds an l_p error and keeps its weights of one l_q size."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from plait.configs.domains import Number
from plait.kernels.online_memory import Rule
from plait.models.mixers.base import register
from plait.models.mixers.linear.miras import MirasConfig

Exponent = Annotated[float, Number(least=1, most=16)]
"""Of a norm."""


@register(
    "moneta",
    kind="linear",
    source="It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online Optimization (2504.13173)",
    proof="token by token in float64, three tokens by hand",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MonetaConfig(MirasConfig):
    """`A_t = a_t A_{t-1} - b_t grad |M(k_t) - v_t|_p^p`, `W_t = A_t / norm_q(A)^(q - 2)`, `o_t = M_t(q_t)`.

    M is `x + norm(W_1 gelu(W_2 x))`; a and b are sigmoids of a low rank of x for each channel: of the keys in W_2, of the values in W_1.
    The gradient has `tanh(10 e)` for the sign and `sqrt(e^2 + 1e-6)` for `|e|`. Gradients are taken and the norm is applied at chunk
    borders. q, k and v are convolved with SiLU, q and k of unit norm; what is read is normalised and gated. The paper gives neither a
    number of heads nor first values; here a begins near 0.98 and b near 0.002.
    """

    p: Exponent = 3.0
    """Exponent of the error."""
    q: Exponent = 4.0
    """Exponent of the norm of the weights; 2 leaves them as they are."""

    @property
    def rule(self) -> Rule:
        return Rule(residual=True, p=self.p, retention="lq", q=self.q, chunk_size=self.chunk_size)
