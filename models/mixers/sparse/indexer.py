"""The lightning indexer: few light heads score every token before, and what scores best is attended to."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from plait.kernels import SelectedBlocks, Tokens, index_divergence, topk_blocks
from plait.kernels.shapes import accumulation_dtype
from plait.models.axes import EMBED
from plait.models.build import BuildContext, fan_in_normal, train_alone
from plait.models.layers.linear import Dense
from plait.models.layers.norms import GroupNorm
from plait.models.mixers.heads import split_heads
from plait.models.positions.rotary import Rotary

NORM_EPS = 1e-6


class Index(NamedTuple):
    """What scores `sum_h weights_ih relu(q_ih . k_s)` are of."""

    q: jax.Array  # [B, T, I, C]
    k: jax.Array  # [B, S, C]
    weights: jax.Array  # [B, T, I] float32


class Indexer(nnx.Module):
    """`I_is = sum_h w_ih relu(q_ih . k_s) / sqrt(I C)`, `q = W_q c`, `k = norm(W_k x)` with mean and bias, `w = W_w x` in float32.

    The first channels of queries and keys are turned by their positions. What comes in brings no gradient back.
    """

    def __init__(
        self,
        ctx: BuildContext,
        d_model: int,
        *,
        query_dim: int,
        num_heads: int,
        head_dim: int,
        rotary: Rotary | None,
        turned: int,
        alone: bool = False,
    ):
        """Args: `query_dim` channels of c, the first `turned` of a head have positions; `alone`: nothing else in the model is trained."""
        self.num_heads, self.head_dim, self.rotary, self.num_turned = num_heads, head_dim, rotary, turned
        self.q = Dense(
            ctx, query_dim, num_heads * head_dim, (EMBED if query_dim == d_model else None, None), heads=(1, num_heads)
        )
        self.k = Dense(ctx, d_model, head_dim, (EMBED, None))
        self.k_norm = GroupNorm(ctx, head_dim, groups=1, eps=NORM_EPS)
        self.w = ctx.param(fan_in_normal(), (d_model, num_heads), (EMBED, None), role="router", exact=True)
        if alone:
            train_alone(self)

    def __call__(self, x: jax.Array, queries: jax.Array, at: Tokens) -> Index:
        """Of the layer's input `[B, T, D]` and what queries are projections of, `[B, T, query_dim]`."""
        x, queries = jax.lax.stop_gradient((x, queries))
        q, k = split_heads(self.q(queries), self.num_heads), self.k_norm(self.k(x))
        k = self._turned(k[:, :, None], at)[:, :, 0]
        exact = accumulation_dtype(x)
        weights = jnp.matmul(x.astype(exact), self.w[...].astype(exact), precision="highest")
        return Index(self._turned(q, at), k, weights * (self.num_heads * self.head_dim) ** -0.5)

    def _turned(self, heads: jax.Array, at: Tokens) -> jax.Array:
        if self.rotary is None:
            return heads
        turned, rest = jnp.split(heads, [self.num_turned], axis=-1)
        return jnp.concatenate([self.rotary.turn_by(turned, at), rest], axis=-1)


def chosen(index: Index, at: Tokens, kv_at: Tokens | None, top_k: int) -> SelectedBlocks | None:
    """The `top_k` tokens that each query sees, the same for all heads; None where it sees all."""
    batch, keys, _ = index.k.shape
    if keys <= top_k:
        return None
    kv_at = (kv_at or at).placed(batch, keys)
    return topk_blocks(
        index.q,
        index.k[:, :, None],
        weights=index.weights,
        blocks_at=Tokens(None, kv_at.segment_ids, kv_at.positions),
        at=at,
        top_k=top_k,
        block_size=1,
        num_blocks=keys,
        num_local=0,
        by_group=True,
    )


def index_loss(index: Index, q: jax.Array, k: jax.Array, *, at: Tokens, **options: Any) -> jax.Array:
    """The mean over tokens of the divergence of the scores from the weights of the attention with these queries, keys and options."""
    rows = index_divergence(index.q, index.k, index.weights, q, k, at=at, **options)
    real = (at.segment_ids > 0).astype(rows.dtype)
    return ((rows * real).sum() / jnp.maximum(real.sum(), 1)).astype(jnp.float32)
