"""Dynamic mask attention: values say how much their token matters, and each query sees the tokens that matter most so far."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Epsilon, Span
from plait.kernels import LowRankBias, SelectedBlocks, Tokens, topk_blocks
from plait.kernels.attention.bias import folded_columns
from plait.models.axes import HEADS, KV_HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.layers.norms import RMSNorm
from plait.models.mixers.base import register
from plait.models.mixers.full.dot_product import DotProduct, GroupedConfig
from plait.models.mixers.full.weighted import mean_keys
from plait.models.mixers.heads import join_heads
from plait.models.mixers.sparse.selecting import mean_past


@register(
    "dma",
    kind="sparse",
    source="Trainable Dynamic Mask Sparse Attention (2508.02124)",
    proof="transformers: Doge, outputs and gradients",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DMAConfig(GroupedConfig):
    """`o_i = sum_j softmax_j(q_i . k_j / sqrt(K) + d_j) v_j` over the top_k visible keys of the largest `d_j`.

        d_j = a softplus(W v_j) of each key head     v_j: the values of all key heads     a begins at 0

    What a token counts for depends on it alone, so a query sees the best of all tokens up to itself; of equal ones the later, and itself
    only if it is among them. The choice has no gradient, the bias has. Queries and keys are RMS-normalised.
    """

    directions = ("causal",)

    top_k: Span = 2048
    """Tokens that a query sees; in sequences that are no longer, all."""
    bias: Literal["softplus", "exp"] = "softplus"
    """`exp`: the bias is the exponential of d, as in the paper's formula and in Doge; `softplus` is d itself, as later released for
    stability. Both choose the same tokens."""
    qk_norm_eps: Epsilon = 1e-6
    """Epsilon of the norm of queries and keys."""

    def check(self) -> None:
        super().check()
        if self.positions is not None and self.positions.place == "logits":
            raise ValueError(f"positions={self.positions.name} adds to the logits, where the tokens' own bias is; use 'rotary'")

    @classmethod
    def example(cls) -> DMAConfig:
        return cls(num_heads=4, num_kv_heads=2, head_dim=16, top_k=7)

    @property
    def unclipped(self) -> str | None:
        return "normalises queries and keys, which sets their size whatever their projections are"

    def build(self, d_model: int, ctx: BuildContext) -> DMA:
        return DMA(self, d_model, ctx)

    def seen_keys(self, d_model: int, seq_len: int) -> float:
        return mean_keys(seq_len, self.top_k)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        maps, keys, values = self.maps(d_model)
        seen = self.seen_keys(d_model, seq_len)
        scores = 2.0 * self.heads(d_model)[1] * mean_past(seq_len, 1, 1) if seq_len > self.top_k else 0.0
        return 2.0 * maps * (keys + values + folded_columns(1, keys)) * seen + scores


class DMAInputs(NamedTuple):
    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, S, Hkv, K]
    v: jax.Array  # [B, S, Hkv, K]
    d: jax.Array  # [B, S, Hkv]
    kv_at: Tokens | None = None  # where the keys stand, when they are not the queries' own tokens


class DMA(DotProduct):
    """See `DMAConfig`."""

    def __init__(self, config: DMAConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.num_heads, self.num_kv_heads = config.heads(d_model)
        self.q = self.projection(ctx, d_model, self.num_heads, config.head_dim)
        self.k, self.v = (self.projection(ctx, d_model, self.num_kv_heads, config.head_dim, KV_HEADS) for _ in range(2))
        self.o = self.projection_back(ctx, d_model, config.head_dim)
        self.q_norm, self.k_norm = (RMSNorm(ctx, config.head_dim, eps=config.qk_norm_eps) for _ in range(2))
        self.d = Dense(ctx, self.num_kv_heads * config.head_dim, self.num_kv_heads, (HEADS, None), role="gate")
        self.a = ctx.param(jax.nn.initializers.zeros, (self.num_kv_heads,), (None,))

    def project(self, x, *, at, state):
        placed = self.placed(x, at)
        q = self.turned(self.q_norm(self.split(self.q(placed), self.num_heads)), at)
        k = self.turned(self.k_norm(self.split(self.k(placed), self.num_kv_heads, KV_HEADS)), at)
        v = self.split(self.v(x), self.num_kv_heads, KV_HEADS)
        d = self.a[...].astype(jnp.float32)[None, None] * jax.nn.softplus(self.d(join_heads(v)).astype(jnp.float32))
        return DMAInputs(q, k, v, d.astype(self.dtype)), state  # as the cache holds it

    def select(self, inputs: DMAInputs, at: Tokens) -> SelectedBlocks | None:
        """The tokens that each query sees; None where it sees all."""
        batch, keys, heads = inputs.d.shape
        if keys <= self.config.top_k:
            return None
        kv_at = (inputs.kv_at or at).placed(batch, keys)
        return topk_blocks(
            jnp.ones((batch, inputs.q.shape[1], heads, 1), inputs.d.dtype),
            inputs.d[..., None],
            blocks_at=Tokens(None, kv_at.segment_ids, kv_at.positions),
            at=at,
            top_k=self.config.top_k,
            block_size=1,
            num_blocks=keys,
            num_local=0,
        )

    def options(self, inputs, at) -> dict[str, Any]:
        d = inputs.d if self.config.bias == "softplus" else jnp.exp(inputs.d)
        bias = LowRankBias(jnp.ones((1, inputs.q.shape[1], 1, 1), d.dtype), d[..., None])
        return {"mask": self.mask, "scale": self.scale, "bias": bias, "selected": self.select(inputs, at)}

    def attend_active(self, inputs, active, *, at):
        return self.weigh(inputs, at=at)

    def entries(self):
        return {**super().entries(), "d": ((self.num_kv_heads,), KV_HEADS)}

    def kept(self, inputs):
        return {**super().kept(inputs), "d": inputs.d}

    def recalled(self, inputs, cache):
        return super().recalled(inputs, cache)._replace(d=cache.entries["d"])
