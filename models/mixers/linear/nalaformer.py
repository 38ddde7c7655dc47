"""NaLaFormer: linear attention that is sharper where a query is longer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from plait.configs.domains import Epsilon
from plait.models.build import BuildContext
from plait.models.layers.norms import GroupNorm
from plait.models.mixers.base import register
from plait.models.mixers.heads import join_heads, split_heads
from plait.models.mixers.linear.feature_attention import Weights
from plait.models.mixers.linear.lepe_attention import LepeAttention, LepeConfig


@register(
    "nalaformer",
    kind="linear",
    source="NaLaFormer: Norm-Aware Linear Attention for Transformer Models (2506.21137)",
    proof="the authors' NormAwareLinearAttn",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class NaLaFormerConfig(LepeConfig):
    """`A_ij = f(q_i) . g(k_j) / (f(q_i) . sum_j g(k_j))`, `f(q) = [relu(q / |q|)^p, relu(-q / |q|)^p]`, `g(k) = [relu(k^3), relu(-k^3)]`,
    `p = 3 (1/2 + tanh |q|)`.

    Signs have channels of their own, so that no product is negative. The features above the line are rotated. The output is
    `W_o (LN(A v + LePE(v)) * silu(W_g x))`. Published bidirectional; causal, sums end at the token.
    """

    norm_eps: Epsilon = 1e-5
    """Epsilon of the output norm."""

    def sums(self, d_model: int) -> dict[str, tuple[int, int]]:
        return {"memory": (2 * self.head_dim, self.head_dim), "keys": (2 * self.head_dim, 1)}

    def build(self, d_model: int, ctx: BuildContext) -> NaLaFormer:
        return NaLaFormer(self, d_model, ctx)


class NaLaFormer(LepeAttention):
    """See `NaLaFormerConfig`."""

    def __init__(self, config: NaLaFormerConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.norm = GroupNorm(ctx, self.num_heads * config.head_dim, groups=1, eps=config.norm_eps)

    def features(self, q, k, turn):
        length = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(q), axis=-1, keepdims=True), 1e-24))
        power = 3 * (0.5 + jnp.tanh(length))
        signs = [(jax.nn.relu(s * q / length) ** power, jax.nn.relu(s * k * k * k)) for s in (1, -1)]
        join = lambda parts: jnp.concatenate(list(parts), axis=-1)
        return (
            *(join(parts) for parts in zip(*signs, strict=True)),
            *(join(map(turn, parts)) for parts in zip(*signs, strict=True)),
        )

    def weigh(self, inputs, sums):
        mean = sums.mass("keys", inputs.q, inputs.k) / sums.count
        return Weights(inputs.q_turned / ((mean + 1e-6) * sums.count), inputs.k_turned)

    def finish(self, o, inputs, x):
        o = split_heads(self.norm(join_heads(o + inputs.lepe)), self.num_heads)
        return o * jax.nn.silu(split_heads(self.gate(x), self.num_heads))
