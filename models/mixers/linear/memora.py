"""Memora: a memory whose weights are shares, kept close to the last ones by relative entropy."""

from __future__ import annotations

import dataclasses

import jax

from plait.kernels.online_memory import Rule
from plait.models.build import BuildContext
from plait.models.mixers.base import register
from plait.models.mixers.linear.miras import Miras, MirasConfig


@register(
    "memora",
    kind="linear",
    source="It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online Optimization (2504.13173)",
    proof="token by token in float64, three tokens by hand",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoraConfig(MirasConfig):
    """`W_t = softmax(a_t log W_{t-1} - b_t grad |M(k_t) - v_t|_2^2)`, `o_t = M_t(q_t)`.

    M is `x + norm(W_1 gelu(W_2 x))`; a and b are sigmoids of a low rank of x for each channel: of the keys in W_2, of the values in W_1,
    and the softmax runs over the units between the two, so that each channel has its shares of them. a being the same along them, log W
    without its normaliser is a plain recurrence: it is the state, and the softmax of each token exact. Gradients are taken at chunk
    borders. q, k and v are convolved with SiLU, q and k of unit norm; what is read is normalised and gated. The paper gives neither a
    number of heads nor first values; here log W begins as unit normal, a near 0.98 and b near 0.002.

    The weights of all tokens of a chunk exist at once: memory and work grow with chunk_size.
    """

    @property
    def rule(self) -> Rule:
        return Rule(residual=True, retention="kl", chunk_size=self.chunk_size)

    def build(self, d_model: int, ctx: BuildContext) -> Miras:
        return Miras(self, d_model, ctx, init=jax.nn.initializers.normal(1.0))
