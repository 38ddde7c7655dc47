"""Attention whose queries, keys and values have heads and widths of their own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs.domains import Channels, Factor, Heads
from plait.kernels import Tokens
from plait.models.axes import EMBED, HEADS, KV_HEADS, MLP
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.base import register
from plait.models.mixers.full.dot_product import DotProduct, PlacedConfig
from plait.models.mixers.heads import expanded, require_divides


@register(
    "diff_qkv",
    kind="full",
    source="Sigma: Differential Rescaling of Query, Key and Value (2501.13629)",
    proof="head by head in NumPy",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffQKVConfig(PlacedConfig):
    """Softmax attention of H query heads to Hk keys and Hv values: query head h meets key `floor(h Hk / H)` and value `floor(h Hv / H)`.

    The cache keeps Hk K' + Hv V numbers a token. Keys narrower than queries (`k_head_dim`) are widened by one more projection when
    they are read. Augmented queries are a gated MLP of the first projection: `q = W_3 (silu(W_1 q_0) * W_2 q_0)`, `q_0 = W_q x`.
    The paper does not say how wide that is, nor where it rotates: here a matrix a head, and the widened keys are rotated.
    """

    num_k_heads: Heads = 4
    """Key heads, a divisor of num_heads."""
    num_v_heads: Heads = 16
    """Value heads, a divisor of num_heads."""
    k_head_dim: Channels | None = None
    """Channels of a cached key; None gives head_dim, and no projection that widens it."""
    augmented_q: Factor | None = 1.5
    """Inner width of the queries' MLP over d_model; None for plain queries."""

    def check(self) -> None:
        super().check()
        if self.k_head_dim is not None and self.k_head_dim >= self.head_dim:
            raise ValueError(
                f"k_head_dim={self.k_head_dim} must be below head_dim={self.head_dim}, to which keys are widened; use None for as wide"
            )

    @classmethod
    def example(cls) -> DiffQKVConfig:
        return cls(num_heads=8, num_k_heads=2, num_v_heads=4, head_dim=8, augmented_q=0.5)

    def count_heads(self, d_model: int) -> int:
        num_heads = super().count_heads(d_model)
        for name in ("num_k_heads", "num_v_heads"):
            require_divides((name, getattr(self, name)), ("num_heads", num_heads))
        return num_heads

    def build(self, d_model: int, ctx: BuildContext) -> DiffQKV:
        return DiffQKV(self, d_model, ctx)


class OwnHeads(NamedTuple):
    """Heads as the op takes them, and as they are."""

    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, S, lcm(Hk, Hv), K]
    v: jax.Array  # [B, S, lcm(Hk, Hv), V]
    own: Mapping[str, jax.Array]  # keys [B, T, Hk, K'] and values [B, T, Hv, V] of the new tokens
    kv_at: Tokens | None = None


class QueryMLP(nnx.Module):
    """`q = W_3 (silu(W_1 q_0) * W_2 q_0)`."""

    def __init__(self, ctx: BuildContext, width: int, inner: int, num_heads: int):
        self.gate, self.up = (Dense(ctx, width, inner, (None, MLP)) for _ in range(2))
        self.down = Dense(ctx, inner, width, (MLP, None), heads=(1, num_heads))

    def __call__(self, q: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(q)) * self.up(q))


class DiffQKV(DotProduct):
    """See `DiffQKVConfig`. The op gets keys and values repeated to the least number of heads that both divide."""

    def __init__(self, config: DiffQKVConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        width, k_dim = self.num_heads * config.head_dim, config.k_head_dim or config.head_dim
        inner = None if config.augmented_q is None else expanded(config.augmented_q, d_model, name="augmented_q")
        self.q = Dense(ctx, d_model, width, (EMBED, HEADS if inner is None else None), heads=(1, self.num_heads))
        self.q_mlp = QueryMLP(ctx, width, inner, self.num_heads) if inner is not None else None
        self.k = self.projection(ctx, d_model, config.num_k_heads, k_dim, KV_HEADS)
        self.v = self.projection(ctx, d_model, config.num_v_heads, config.head_dim, KV_HEADS)
        widened = (config.num_k_heads,) if config.k_head_dim is not None else None
        self.k_up = Dense(ctx, k_dim, config.head_dim, (KV_HEADS, None, None), lead=widened) if widened is not None else None
        self.o = self.projection_back(ctx, d_model, config.head_dim)

    def project(self, x, *, at, state):
        placed = self.placed(x, at)
        q = self.q(placed)
        q = q if self.q_mlp is None else self.q_mlp(q)
        q = self.turned(self.split(q, self.num_heads), at)
        k = self.split(self.k(placed), self.config.num_k_heads, KV_HEADS)
        own = {
            "k": k if self.k_up is not None else self.turned(k, at),
            "v": self.split(self.v(x), self.config.num_v_heads, KV_HEADS),
        }
        return OwnHeads(q, *self.keys_and_values(own, at), own), state

    def keys_and_values(self, own: Mapping[str, jax.Array], at: Tokens) -> tuple[jax.Array, jax.Array]:
        """As many of both, and as wide as queries, of tokens that stand there."""
        k, v = own["k"], own["v"]
        if self.k_up is not None:
            k = self.turned(jnp.einsum("bshk,hkc->bshc", k, self.k_up.weight().astype(k.dtype)), at)
        heads = math.lcm(k.shape[2], v.shape[2])
        return jnp.repeat(k, heads // k.shape[2], axis=2), jnp.repeat(v, heads // v.shape[2], axis=2)

    def kept(self, inputs):
        return inputs.own

    def recalled(self, inputs, cache):
        k, v = self.keys_and_values(cache.entries, cache.at)
        return inputs._replace(k=k, v=v, kv_at=cache.at)

    def entries(self):
        config = self.config
        return {
            "k": ((config.num_k_heads, config.k_head_dim or config.head_dim), KV_HEADS),
            "v": ((config.num_v_heads, config.head_dim), KV_HEADS),
        }
