"""HCAM: a query attends to its own chunk, and picks past ones by their summaries, attends to each apart, and mixes what it finds."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from plait.configs.domains import Channels, Span
from plait.kernels import ChunkMask, SelectedBlocks, Tokens, attention, attention_rows, topk_blocks
from plait.kernels.shapes import accumulation_dtype
from plait.models.axes import KV_HEADS
from plait.models.build import BuildContext
from plait.models.looks.look import Selection
from plait.models.mixers.base import register
from plait.models.mixers.sparse.selecting import Blocks, Selecting, SelectingConfig, mean_past


@register(
    "hcam",
    kind="sparse",
    source="Towards mental time travel: a hierarchical memory for reinforcement learning agents (2105.14039)",
    proof="relevance, chunks apart and their mixture by hand in float64",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class HCAMConfig(SelectingConfig):
    """`o_i = a_i(own) + sum_n r_in a_i(n)` over the past chunks n of the largest z, `a_i(n) = softmax_{j in n}(q_i . k_j / sqrt(K)) v_j`.

        z_in = (W_r x_i) . mean_{j in chunk n}(W_s x_j) / sqrt(R)     one for all heads;     r_i = softmax of the top_k largest

    The relevance r has a gradient, so the scorer learns as a part of the output. The query's own chunk, seen so far, stands for the local
    attention that the paper's block has beside its memory, in a layer of its own there. The paper's agent stores chunks without a gradient;
    here they have theirs.
    """

    block_size: Span = 64
    """Tokens a chunk, counted from the start of the document."""
    top_k: Blocks = 4
    """Past chunks that a query attends to, besides its own."""
    relevance_dim: Channels | None = None
    """Channels of the summaries, R; None gives head_dim."""

    @classmethod
    def example(cls) -> HCAMConfig:
        return cls(num_heads=4, num_kv_heads=2, head_dim=16, block_size=4, top_k=3)

    def whole_blocks(self, own: np.ndarray) -> np.ndarray:
        return np.minimum(self.top_k, own)

    @property
    def channels(self) -> int:
        """Of the summaries."""
        return self.relevance_dim or self.head_dim

    def build(self, d_model: int, ctx: BuildContext) -> HCAM:
        return HCAM(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        scores = 2.0 * self.channels * (mean_past(seq_len, self.block_size, self.block_size + 1) + self.top_k)
        return self.pair_flops(d_model) * self.seen_keys(d_model, seq_len) + scores


class HCAMInputs(NamedTuple):
    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, S, Hkv, K]
    v: jax.Array  # [B, S, Hkv, K]
    relevance: jax.Array  # [B, T, 1, R], what a query looks for
    summary: jax.Array  # [B, T, 1, R], what a token adds to its chunk's
    kv_at: Tokens | None = None  # where the keys stand, when they are not the queries' own tokens
    blocks: tuple[jax.Array, Tokens] | None = None  # [B, N, 1, R] for the chunks, and where they stand, when those are a cache's


class HCAM(Selecting):
    """See `HCAMConfig`."""

    def __init__(self, config: HCAMConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.q = self.projection(ctx, d_model, self.num_heads, config.head_dim)
        self.k, self.v = (self.projection(ctx, d_model, self.num_kv_heads, config.head_dim, KV_HEADS) for _ in range(2))
        self.relevance, self.summary = (self.projection(ctx, d_model, 1, config.channels) for _ in range(2))
        self.o = self.projection_back(ctx, d_model, config.head_dim)
        self.own = ChunkMask(chunk_size=config.block_size)

    def project(self, x, *, at, state):
        placed = self.placed(x, at)
        q = self.turned(self.split(self.q(placed), self.num_heads), at)
        k = self.turned(self.split(self.k(placed), self.num_kv_heads, KV_HEADS), at)
        relevance, summary = (dense(x)[:, :, None] for dense in (self.relevance, self.summary))
        return HCAMInputs(q, k, self.split(self.v(x), self.num_kv_heads, KV_HEADS), relevance, summary), state

    def summed(self, inputs):
        return inputs.summary

    def sums_shape(self):
        return 1, self.config.channels

    def select(self, inputs, at):
        means, blocks_at = self.mean_keys(inputs, at)
        return topk_blocks(
            inputs.relevance,
            means,
            blocks_at=blocks_at,
            at=at,
            top_k=self.config.top_k + 1,
            block_size=self.config.block_size,
            num_blocks=self.num_blocks(inputs),
        )

    def mixture(self, inputs: HCAMInputs, at: Tokens) -> tuple[SelectedBlocks, jax.Array]:
        """The past chunks of each query and what they count, float32 `[B, T, N]`, zeros where there is none."""
        chosen, (means, blocks_at) = self.select(inputs, at), self.mean_keys(inputs, at)
        chosen = dataclasses.replace(chosen, indices=chosen.indices[..., 1:])  # without the query's own, the first
        number = chosen.indices[:, :, 0]  # [B, T, N]
        own = at.placed(*inputs.q.shape[:2]).segment_ids[:, :, None, None]
        match = (blocks_at.positions[:, None, None] == number[..., None]) & (blocks_at.segment_ids[:, None, None] == own)
        take = jax.vmap(lambda means, index: means[index])
        picked = take(means[:, :, 0], jnp.argmax(match, axis=-1))  # [B, T, N, R]
        real, dtype = (number >= 0) & match.any(-1), accumulation_dtype(inputs.q)
        z = jnp.einsum("btr,btnr->btn", inputs.relevance[:, :, 0].astype(dtype), picked.astype(dtype), precision="highest")
        z = jnp.where(real, self.config.channels**-0.5 * z, -1e30)
        return chosen, jnp.where(real, jax.nn.softmax(z, axis=-1), 0)

    def apart(self, inputs: HCAMInputs, chosen: SelectedBlocks) -> tuple[jax.Array, dict[str, Any]]:
        """The queries once for each of their chunks, as heads of their own, and the options of the ops."""
        batch, length, heads, channels = inputs.q.shape
        count = chosen.indices.shape[-1]
        q = jnp.broadcast_to(inputs.q[:, :, :, None], (batch, length, heads, count, channels))
        indices = jnp.broadcast_to(chosen.indices, (batch, length, heads, count))
        one = dataclasses.replace(chosen, indices=indices.reshape(batch, length, heads * count, 1))
        options = {"mask": self.mask, "scale": self.scale, "selected": one}
        return q.reshape(batch, length, heads * count, channels), options

    def weigh(self, inputs, *, at):
        chosen, share = self.mixture(inputs, at)
        q, options = self.apart(inputs, chosen)
        o: Any = attention(q, inputs.k, inputs.v, at=at, kv_at=inputs.kv_at, **options)
        o = o.reshape(*inputs.q.shape[:3], -1, o.shape[-1]).astype(share.dtype)
        own: Any = attention(inputs.q, inputs.k, inputs.v, mask=self.own, scale=self.scale, at=at, kv_at=inputs.kv_at)
        return (own.astype(share.dtype) + (share[:, :, None, :, None] * o).sum(3)).astype(inputs.q.dtype)

    def implied(self, inputs, rows, *, at):
        chosen, share = self.mixture(inputs, at)
        q, options = self.apart(inputs, chosen)
        weights = attention_rows(q, inputs.k, rows=rows, at=at, **options)
        weights = weights.reshape(weights.shape[0], self.num_heads, -1, *weights.shape[2:])  # [B, H, N, R, S]
        own = attention_rows(inputs.q, inputs.k, rows=rows, at=at, mask=self.own, scale=self.scale)
        return own + (jnp.moveaxis(share[:, rows], 2, 1)[:, None, ..., None] * weights).sum(2)

    def observe(self, inputs, x, *, at):
        dense = lambda rows: attention_rows(inputs.q, inputs.k, rows=rows, at=at, mask=self.mask, scale=self.scale)
        return {"selection": Selection(self.select(inputs, at), dense)}
