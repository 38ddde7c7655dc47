"""RALA: linear attention whose keys count as much as the mean query asks, which raises the rank of the state."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from plait.kernels import Tokens
from plait.kernels.chunking import segment_index
from plait.models.build import BuildContext
from plait.models.mixers.base import register
from plait.models.mixers.linear.feature_attention import Weights
from plait.models.mixers.linear.lepe_attention import LepeAttention, LepeConfig
from plait.models.mixers.linear.sums import read_flops


@register(
    "rala",
    kind="linear",
    source="Breaking the Low-Rank Dilemma of Linear Attention (2411.07635)",
    proof="the authors' GateLinearAttentionNoSilu",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RALAConfig(LepeConfig):
    """`A_ij = f(q_i) . c_j f(k_j) / (f(q_i) . sum_j c_j f(k_j))`, `c_j = N softmax_j(mean_i f(q_i) . f(k_j) / sqrt(K))`,
    `f(x) = elu(x) + 1`.

    N tokens are in the document, whose mean query no token of a causal layer could know. Features above the line are rotated.
    The output is `W_o ((A v + LePE(v)) * W_g x)`.
    """

    directions = ("bidirectional",)

    def sums(self, d_model: int) -> dict[str, tuple[int, int]]:
        return {}

    def build(self, d_model: int, ctx: BuildContext) -> RALA:
        return RALA(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        dim, num_heads = self.head_dim, self.heads(d_model)
        sums = read_flops(dim, dim) + read_flops(dim, 1) + read_flops(1, dim) + read_flops(1, 1)  # memory, keys, queries, shares
        convolved = 2.0 * (self.lepe_size + 1) * dim
        return num_heads * (2 * sums + convolved)  # sums run forward and backward


class RALA(LepeAttention):
    """See `RALAConfig`."""

    def weigh(self, inputs, sums):
        q, k, *_ = inputs
        asked = self.config.head_dim**-0.5 * jnp.sum(sums.total("queries", q) / sums.count * k, axis=-1, keepdims=True)
        share = jnp.exp(asked - document_maximum(asked, sums.at))
        c = share * sums.count / jnp.maximum(sums.total("shares", share), 0.5)  # a document's is at least 1, that of padding 0
        mean = sums.mass("keys", q, c * k) / sums.count
        return Weights(inputs.q_turned / ((mean + 1e-6) * sums.count), c * inputs.k_turned)


def document_maximum(x: jax.Array, at: Tokens) -> jax.Array:
    """The largest `x` `[B, T, H, 1]` of each token's document, padding left out, through which no gradient flows."""
    index, real = (y[:, :, None, None] for y in segment_index(at.segment_ids))
    x = jax.lax.stop_gradient(jnp.where(real, x, -jnp.inf))

    def join(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return other[0], jnp.where(one[0] == other[0], jnp.maximum(one[1], other[1]), other[1])

    index = jnp.broadcast_to(index, x.shape)
    both = [jax.lax.associative_scan(join, (index, x), axis=1, reverse=reverse)[1] for reverse in (False, True)]
    largest = jnp.maximum(*both)
    return jnp.where(real & jnp.isfinite(largest), largest, 0)
