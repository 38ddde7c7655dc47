"""Yaad: a memory that minds small errors squared and large ones by their size, so that no outlier rewrites it."""

from __future__ import annotations

import dataclasses

import jax

from plait.kernels.online_memory import Rule
from plait.models.build import BuildContext
from plait.models.mixers.base import register
from plait.models.mixers.linear.miras import Miras, MirasConfig
from plait.models.mixers.linear.neural_memory import Gate


@register(
    "yaad",
    kind="linear",
    source="It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online Optimization (2504.13173)",
    proof="token by token in float64, three tokens by hand",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class YaadConfig(MirasConfig):
    """`W_t = a_t W_{t-1} - b_t grad l`, l being `|e|_2^2` where the error `e = M(k_t) - v_t` is at most d_t long, else `d_t |e|_1`.

    M is `x + norm(W_1 gelu(W_2 x))`; a and b are sigmoids of a low rank of x for each channel: of the keys in W_2, of the values in W_1.
    d is a softplus of x, one a head, since it is compared with a length. The gradient has `tanh(10 e)` for the sign. q, k and v are
    convolved with SiLU, q and k of unit norm; what is read is normalised and gated. The paper gives neither a number of heads nor first
    values; here a begins near 0.98, b near 0.002 and d near 2 sqrt(head_dim), longer than most errors.
    """

    @property
    def rule(self) -> Rule:
        return Rule(residual=True, bias="huber", chunk_size=self.chunk_size)

    def build(self, d_model: int, ctx: BuildContext) -> Yaad:
        return Yaad(self, d_model, ctx)


class Yaad(Miras):
    """See `YaadConfig`."""

    def __init__(self, config: YaadConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.threshold = Gate(ctx, d_model, (self.num_heads,), start=2 * config.head_dim**0.5)

    def gates(self, x):
        return {**super().gates(x), "threshold": jax.nn.softplus(self.threshold(x))}
