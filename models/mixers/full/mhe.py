"""Heads that are one projection each of queries, keys and values, told apart by a vector a head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax

from plait.kernels import Tokens
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.base import register
from plait.models.mixers.full.dot_product import DotProduct, PlacedConfig


@register(
    "mhe",
    kind="full",
    source="Pit One Against Many: Attention-head Embeddings (2310.07911)",
    proof="head by head in NumPy, softmax with scaled matrices",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MHEConfig(PlacedConfig):
    """Softmax attention with `q_h = x W_q + e_h` (`add`) or `x W_q * (1 + e_h)` (`multiply`), k and v alike, one K-wide W for all heads.

    Beside one head's projections there are 3HK parameters. The cache keeps the one key and value: heads are told apart when it is read.
    The paper's abstract does not say how the vectors start, nor the 1: here from N(0, 0.02^2), as the embeddings of its models.
    """

    combine: Literal["add", "multiply"] = "multiply"
    """How a head's vector changes what it shares."""

    @classmethod
    def example(cls) -> MHEConfig:
        return cls(num_heads=4, head_dim=16)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        scaled = 3 * self.count_heads(d_model) * self.head_dim if self.combine == "multiply" else 0
        return super().mixing_flops(d_model, seq_len) + 2.0 * scaled

    def build(self, d_model: int, ctx: BuildContext) -> MHE:
        return MHE(self, d_model, ctx)


class Shared(NamedTuple):
    """Heads, and what they are made of."""

    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, S, H, K]
    v: jax.Array  # [B, S, H, K]
    shared: Mapping[str, jax.Array]  # key and value of the new tokens that all heads share, [B, T, K]
    kv_at: Tokens | None = None


class MHE(DotProduct):
    """See `MHEConfig`."""

    def __init__(self, config: MHEConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.q, self.k, self.v = (Dense(ctx, d_model, config.head_dim, (EMBED, None)) for _ in range(3))
        start = jax.nn.initializers.normal(0.02)
        self.q_heads, self.k_heads, self.v_heads = (
            ctx.param(start, (self.num_heads, config.head_dim), (HEADS, None)) for _ in range(3)
        )
        self.o = self.projection_back(ctx, d_model, config.head_dim)

    def heads(self, shared: jax.Array, vectors: jax.Array) -> jax.Array:
        """`[B, T, K]` to `[B, T, H, K]`."""
        vectors, shared = vectors.astype(shared.dtype)[None, None], shared[:, :, None]
        return shared + vectors if self.config.combine == "add" else shared * (1 + vectors)

    def project(self, x, *, at, state):
        placed = self.placed(x, at)
        q = self.turned(self.heads(self.q(placed), self.q_heads[...]), at)
        shared = {"k": self.k(placed), "v": self.v(x)}
        return Shared(q, *self.keys_and_values(shared, at), shared), state

    def keys_and_values(self, shared: Mapping[str, jax.Array], at: Tokens) -> tuple[jax.Array, jax.Array]:
        """Those of all heads, `[B, S, H, K]`, at tokens that stand there."""
        k = self.turned(self.heads(shared["k"], self.k_heads[...]), at)
        return k, self.heads(shared["v"], self.v_heads[...])

    def entries(self):
        one = ((self.config.head_dim,), None)
        return {"k": one, "v": one}

    def kept(self, inputs):
        return inputs.shared

    def recalled(self, inputs, cache):
        k, v = self.keys_and_values(cache.entries, cache.at)
        return inputs._replace(k=k, v=v, kv_at=cache.at)
