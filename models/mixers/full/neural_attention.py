"""Neural attention: a small network in place of the dot product."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Channels
from plait.kernels.weighted_attention import Rule, softmax
from plait.models.axes import KV_HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.base import Direction, register
from plait.models.mixers.full.by_rule import ByRule, RuleConfig
from plait.models.positions.base import PositionConfig


@register(
    "neural_attention",
    kind="full",
    source="Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models (2502.17206)",
    proof="the authors' layer, outputs and gradients",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuralAttentionConfig(RuleConfig):
    """`z_ij = w_3 . relu(W_2 relu(W_1 [q'_i; k'_j] + b_1) + b_2) + b_3`, `A_ij = softmax_j z_ij`, with q' = W_q' q + b and k' = W_k' k + b.

    q' and k' have p channels, the hidden layers p and p / 2; all these maps are shared by the heads. W_1 is kept in halves, for queries
    and for keys, which are multiplied once a token: what is made for each pair are their sum and what follows. The authors replace
    their first layer only: `"neural_attention@0; softmax"`.
    """

    positions: PositionConfig | None = None
    """How queries and keys know where they stand; None for no position encoding: the paper adds positions to the embeddings."""
    pair_dim: Channels | None = None
    """p; None gives head_dim / 32, but at least 2, as in the authors' code."""

    directions: ClassVar[tuple[Direction, ...]] = ("causal", "bidirectional")

    def check(self) -> None:
        super().check()
        if self.pair_dim is not None and self.pair_dim < 2:
            raise ValueError(
                f"pair_dim={self.pair_dim} must be at least 2, half of which is the last hidden layer; use 2 or more"
            )

    @classmethod
    def example(cls) -> NeuralAttentionConfig:
        return cls(num_heads=4, head_dim=16, pair_dim=4)

    @property
    def pair_dims(self) -> tuple[int, int]:
        """Channels of the two hidden layers."""
        first = self.pair_dim or max(2, self.head_dim // 32)
        return first, first // 2

    def pair_flops(self) -> float:
        first, second = self.pair_dims
        return 2.0 * (first * second + second + self.head_dim)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        first, second = self.pair_dims
        others = sum(self.heads(d_model)) - 2  # the shared maps are counted for one head of each side, and once for pairs
        shared = 2.0 * (self.head_dim * first + first**2)
        return super().mixing_flops(d_model, seq_len) + others * shared - 2.0 * (first * second + second)

    def build(self, d_model: int, ctx: BuildContext) -> NeuralAttention:
        return NeuralAttention(self, d_model, ctx)


class Layers(NamedTuple):
    second: tuple[jax.Array, jax.Array]  # [p, p / 2] and [p / 2]
    third: tuple[jax.Array, jax.Array]  # [p / 2, 1] and [1]


@dataclasses.dataclass(frozen=True)
class PairNetwork(Rule):
    """See `NeuralAttentionConfig`; q and k come as the first hidden layer's two summands."""

    hidden: int

    @property
    def width(self):
        return self.hidden

    def __call__(self, q, k, parameters, seen):
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        q, k = (jnp.moveaxis(y, 2, 1).astype(jnp.promote_types(y.dtype, jnp.float32)) for y in (q, k))
        h = jax.nn.relu(q[:, :, :, None] + k[:, :, None])  # [B, H, R, S, p]
        (w, b), (w_out, b_out) = jax.tree.map(lambda a: a.astype(h.dtype), parameters)
        lift = lambda b: b.reshape(1, 1, 1, 1, -1)
        h = jax.nn.relu(jnp.einsum("bhrsp,po->bhrso", h, w, precision=seen.precision) + lift(b))
        z = jnp.einsum("bhrsp,po->bhrso", h, w_out, precision=seen.precision) + lift(b_out)
        return softmax(z[..., 0], seen.visible)


class NeuralAttention(ByRule):
    """See `NeuralAttentionConfig`."""

    def __init__(self, config: NeuralAttentionConfig, d_model: int, ctx: BuildContext):
        first, second = config.pair_dims
        super().__init__(config, d_model, ctx, PairNetwork(first))
        self.pair_dim = first
        dense = lambda size, out, use_bias=True: Dense(ctx, size, out, (None, None), use_bias=use_bias)
        self.q_down, self.k_down = dense(config.head_dim, first), dense(config.head_dim, first)
        self.q_hidden, self.k_hidden = dense(first, first), dense(first, first, use_bias=False)
        self.second, self.third = dense(first, second), dense(second, 1)

    def parameters(self):
        return Layers(affine(self.second), affine(self.third))

    def prepared(self, q, k, *, at):
        q, k = super().prepared(q, k, at=at)
        return self.q_hidden(self.q_down(q)), self.k_hidden(self.k_down(k))

    def entries(self):
        return super().entries() | {"k": ((self.num_kv_heads, self.pair_dim), KV_HEADS)}


def affine(layer: Dense) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias of a layer that has one."""
    assert layer.bias is not None
    return layer.weight(), layer.bias[...]
