"""Flowformer: linear attention as a flow from sources to sinks, both conserved."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from plait.configs.domains import Epsilon, Heads
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.base import register
from plait.models.mixers.heads import require_divides
from plait.models.mixers.linear.feature_attention import FeatureAttention, FeatureConfig, Features, Weights


@register(
    "flowformer",
    kind="linear",
    source="Flowformer: Linearizing Transformers with Conservation Flows (2202.06258)",
    proof="the authors' Flow_Attention and Flow_Attention_Causal",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowformerConfig(FeatureConfig):
    """`o_i = sigmoid(I'_i) (f(q_i) / I_i) . sum_j f(k_j) c_j v_j^T`, `f = sigmoid`, of flows in and out, and those with one side conserved:

    `I = f(q) . sum f(k)`, `O = f(k) . sum f(q)`, `I' = f(q) . sum f(k) / O`, `O' = f(k) . sum f(q) / I` cut to [-1, 1], and the sources
    compete by `c = N softmax(O')` over the N tokens. Causal, all sums end at the token, means over the tokens so far stand for sums in I
    and O, and `c_j = N_j exp(O'_j) / sum_{i <= j} exp(O'_i)`.
    """

    num_heads: Heads = 8
    """Heads of d_model / num_heads channels."""
    eps: Epsilon = 1e-6
    """Added to features and sums that make a flow."""

    @classmethod
    def example(cls) -> FlowformerConfig:
        return cls(num_heads=4)

    def heads(self, d_model: int) -> int:
        require_divides(("num_heads", self.num_heads), ("d_model", d_model))
        return self.num_heads

    def sums(self, d_model: int) -> dict[str, tuple[int, int]]:
        dim = d_model // self.heads(d_model)
        flows = dict.fromkeys(("incoming", "outgoing", "sinks", "sources"), (dim, 1))
        return {"memory": (dim, dim), **flows, "competition": (1, 1)}

    def build(self, d_model: int, ctx: BuildContext) -> Flowformer:
        return Flowformer(self, d_model, ctx)


class Flowformer(FeatureAttention):
    """See `FlowformerConfig`."""

    LEAST_COMPETITION: ClassVar[float] = 0.1
    """Below any sum of `exp` of numbers from -1 on; keeps the empty sum of padding from dividing."""

    def __init__(self, config: FlowformerConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.eps = config.eps
        self.q, self.k, self.v = (
            Dense(ctx, d_model, d_model, (EMBED, HEADS), heads=(1, self.num_heads), use_bias=True) for _ in range(3)
        )
        self.o = Dense(ctx, d_model, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads), use_bias=True)

    def project(self, x, *, at, state):
        q, k = (jax.nn.sigmoid(self.heads(dense(x)).astype(jnp.float32)) for dense in (self.q, self.k))
        return Features(q, k, self.heads(self.v(x))), state

    def weigh(self, inputs, sums):
        q, k, eps = inputs.q, inputs.k, self.eps
        mean_of = sums.count if self.causal else 1.0

        def flow(name: str, to: jax.Array, of: jax.Array) -> jax.Array:
            """`(to + eps) . (sum of + eps)`."""
            to = to + eps
            return sums.mass(name, to, of) + eps * to.sum(-1, keepdims=True)

        incoming, outgoing = flow("incoming", q, k) / mean_of, flow("outgoing", k, q) / mean_of
        conserved_sink = flow("sinks", q, k / outgoing) / mean_of
        conserved_source = jnp.clip(flow("sources", k, q / incoming) / mean_of, -1, 1)
        source = jnp.exp(conserved_source)
        competition = source * sums.count / jnp.maximum(sums.total("competition", source), self.LEAST_COMPETITION)
        return Weights(jax.nn.sigmoid(conserved_sink) * q / (incoming * mean_of), k * competition)
