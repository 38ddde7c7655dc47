"""Landmark attention: the last token of a block stands for it, and lets a query through to the block's tokens."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from plait.configs.domains import Span, Whole
from plait.kernels.shapes import accumulation_dtype
from plait.kernels.weighted_attention import Rule, dot_products
from plait.kernels.weighted_attention.rule import HIDDEN
from plait.models.build import BuildContext
from plait.models.mixers.base import register
from plait.models.mixers.full.by_rule import ByRule, RuleConfig


@register(
    "landmark",
    kind="sparse",
    source="Landmark Attention: Random-Access Infinite Context Length for Transformers (2305.16300)",
    proof="the grouped softmax token by token in float64",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LandmarkConfig(RuleConfig):
    """`o_i = sum_j w_ij v_j`, a grouped softmax: of blocks of `block_size` tokens the last is the landmark m.

        e = softmax over the tokens of the query's own block, without its landmark, and the landmarks of the blocks before
        w_ij = e_j in the query's own block, e_m(b) softmax_{j in b}(q_i . k_j) in a block b before, without its landmark

    Landmarks themselves get no weight. The place says which token is one: training as published is on text with a token of its own at each
    of those places, which `--data.task landmark` puts there; on other text an ordinary token serves. All blocks are seen unless `top_k`
    keeps the blocks of the best landmarks, as the authors do after training.
    """

    block_size: Span = 64
    """Tokens of a block, the landmark included, counted from the start of the document; 63 + 1 as for LLaMA."""
    top_k: Annotated[int, Whole(1, 2**20)] | None = None
    """Blocks before its own that a query and a head see; None for all, as in training."""

    def check(self) -> None:
        super().check()
        if self.block_size < 2:
            raise ValueError(f"block_size={self.block_size} must hold a token and its landmark; use 64")

    def sees_whole(self, d_model: int, seq_len: int) -> bool:
        return self.top_k is None or self.top_k >= (seq_len - 1) // self.block_size

    @classmethod
    def example(cls) -> LandmarkConfig:
        return cls(num_heads=4, num_kv_heads=2, head_dim=16, block_size=8)

    def build(self, d_model: int, ctx: BuildContext) -> ByRule:
        return ByRule(self, d_model, ctx, GroupedSoftmax(self.block_size, self.top_k))


@dataclasses.dataclass(frozen=True)
class GroupedSoftmax(Rule):
    """See `LandmarkConfig`."""

    block_size: int
    top_k: int | None

    def __call__(self, q, k, parameters, seen):
        size, count = self.block_size, -(-k.shape[1] // self.block_size)
        z = q.shape[-1] ** -0.5 * dot_products(q, k, seen)
        own = (seen.queries.positions // size)[:, None, :, None]
        number = (seen.keys.positions // size)[:, None, None, :]
        mark = (seen.keys.positions % size == size - 1)[:, None, None, :]
        local = seen.visible & (number == own) & ~mark
        marks, tokens = seen.visible & (number < own) & mark, seen.visible & (number < own) & ~mark
        block = jnp.clip(seen.keys.positions // size, 0, count - 1)
        if self.top_k is not None and self.top_k < count:
            scores = _by_block(jnp.where(marks, jax.lax.stop_gradient(z), HIDDEN), block, count, jax.ops.segment_max)
            least = jax.lax.top_k(scores, self.top_k)[0][..., -1:]
            marks = marks & (z >= least)
        extra = _exp(z, local | marks)
        extra = extra / jnp.maximum(extra.sum(-1, keepdims=True), 1e-30)
        peak = _by_block(jnp.where(tokens, jax.lax.stop_gradient(z), HIDDEN), block, count, jax.ops.segment_max)
        inside = jnp.where(tokens, jnp.exp(jnp.where(tokens, z - _of_block(peak, block), 0)), 0)
        total = _by_block(inside, block, count, jax.ops.segment_sum)
        through = _by_block(jnp.where(marks, extra, 0), block, count, jax.ops.segment_sum)
        share = inside * _of_block(through / jnp.where(total > 0, total, 1), block)
        return (jnp.where(local, extra, 0) + share).astype(accumulation_dtype(q, k))


def _exp(z: jax.Array, shown: jax.Array) -> jax.Array:
    """The exponentials of logits over the largest shown of their row."""
    peak = jax.lax.stop_gradient(jnp.max(jnp.where(shown, z, HIDDEN), axis=-1, keepdims=True))
    return jnp.where(shown, jnp.exp(jnp.where(shown, z - peak, 0)), 0)


def _by_block(x: jax.Array, block: jax.Array, count: int, over) -> jax.Array:
    """`[B, H, R, N]` of what is of keys, `[B, H, R, S]`, whose blocks are `[B, S]`."""
    found = jax.vmap(lambda x, block: over(jnp.moveaxis(x, -1, 0), block, num_segments=count))(x, block)
    return jnp.moveaxis(found, 1, -1)


def _of_block(x: jax.Array, block: jax.Array) -> jax.Array:
    """The inverse: what is of each key's block."""
    return jax.vmap(lambda x, block: jnp.take(x, block, axis=-1))(x, block)
