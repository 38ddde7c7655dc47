"""Routing attention: queries and keys belong to clusters, and a query sees the keys that are most of its cluster."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Decay, Span, Whole
from plait.kernels import SelectedBlocks, Tokens, topk_blocks
from plait.models.axes import KV_HEADS
from plait.models.build import BuildContext, Moved
from plait.models.mixers.base import register
from plait.models.mixers.full.by_rule import MultiHead
from plait.models.mixers.full.dot_product import GroupedConfig
from plait.models.mixers.full.weighted import mean_keys
from plait.models.mixers.sparse.selecting import mean_past

_SMALL = 1e-6


@register(
    "routing",
    kind="sparse",
    source="Efficient Content-Based Sparse Attention with Routing Transformers (2003.05997)",
    proof="clusters, choice and moving centroids by hand in float64",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingConfig(GroupedConfig):
    """Softmax attention to the top_k tokens so far with the largest `k_j . m_c`, c being the centroid of the largest `q_i . m_c`.

    Queries and keys are normalised over their channels (layer norm without parameters) before their positions, and centroids m, a set
    for each key head, have length 1. Once a step each moves to the mean of its queries and that of its keys, m = decay m + (1 - decay)
    (mean q + mean k) / 2: k-means online, in no gradient; a centroid without tokens stays.

    In the paper a cluster takes the best tokens of the whole sequence, which tells a query of its future, and leaves out queries that are
    not among them: here of the tokens up to the query, so that a document is the same alone, packed and token by token, and every query
    has its cluster. Its causal models make queries and keys one; here they are two. Half of its heads see a window: put such a layer
    beside this one, in depth or by `parallel`.
    """

    directions = ("causal",)

    num_clusters: Annotated[int, Whole(1, 2**16)] = 64
    """Centroids of a key head; the paper has the square root of the sequence length."""
    top_k: Span = 64
    """Tokens that a query sees: the length over the clusters, as the paper has it."""
    decay: Decay = 0.999
    """What stays of a centroid in a step."""

    def check(self) -> None:
        super().check()
        if self.positions is not None and self.positions.place == "logits":
            raise ValueError(
                f"positions={self.positions.name} adds to the logits, and the scores by which tokens are chosen have none; use 'rotary'"
            )

    @classmethod
    def example(cls) -> RoutingConfig:
        return cls(num_heads=4, num_kv_heads=2, head_dim=16, num_clusters=3, top_k=7)

    def build(self, d_model: int, ctx: BuildContext) -> Routing:
        return Routing(self, d_model, ctx)

    def seen_keys(self, d_model: int, seq_len: int) -> float:
        return mean_keys(seq_len, self.top_k)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        (heads, kv_heads), (maps, keys, values) = self.heads(d_model), self.maps(d_model)
        seen = self.seen_keys(d_model, seq_len)
        clusters = 2.0 * self.num_clusters * self.head_dim * (heads + kv_heads)
        scores = 2.0 * heads * self.num_clusters * mean_past(seq_len, 1, 1) if seq_len > self.top_k else 0.0
        return 2.0 * maps * (keys + values) * seen + clusters + scores


class Routed(NamedTuple):
    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, S, Hkv, K]
    v: jax.Array  # [B, S, Hkv, K]
    cluster: jax.Array  # [B, T, H] int32, of each query
    scores: jax.Array  # [B, S, Hkv, C], of each key and centroid
    plain: Any = None  # the same q and k before their positions, of whole sequences
    kv_at: Tokens | None = None  # where the keys stand, when they are not the queries' own tokens


class Routing(MultiHead):
    """See `RoutingConfig`."""

    def __init__(self, config: RoutingConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        shape = self.num_kv_heads, config.num_clusters, config.head_dim
        self.centroids = Moved(_unit(jax.random.normal(ctx.rngs.params(), shape)), axes=(KV_HEADS, None, None))

    def project(self, x, *, at, state):
        placed = self.placed(x, at)
        q = _normalised(self.split(self.q(placed), self.num_heads))
        k = _normalised(self.split(self.k(placed), self.num_kv_heads, KV_HEADS))
        v = self.split(self.v(x), self.num_kv_heads, KV_HEADS)
        centroids = jax.lax.stop_gradient(self.centroids[...])
        grouped = jax.lax.stop_gradient(q).astype(jnp.float32).reshape(*q.shape[:2], self.num_kv_heads, -1, q.shape[3])
        near = jnp.einsum("btgrk,gck->btgrc", grouped, centroids, precision="highest")
        cluster = jnp.argmax(near, axis=-1).reshape(*q.shape[:3]).astype(jnp.int32)
        scores = jnp.einsum("btgk,gck->btgc", jax.lax.stop_gradient(k).astype(jnp.float32), centroids, precision="highest")
        return Routed(self.turned(q, at), self.turned(k, at), v, cluster, scores.astype(self.dtype), (q, k)), state

    def select(self, inputs: Routed, at: Tokens) -> SelectedBlocks | None:
        """The tokens that each query sees; None where it sees all."""
        batch, keys = inputs.k.shape[:2]
        if keys <= self.config.top_k:
            return None
        kv_at = (inputs.kv_at or at).placed(batch, keys)
        return topk_blocks(
            jax.nn.one_hot(inputs.cluster, self.config.num_clusters, dtype=inputs.scores.dtype),
            inputs.scores,
            blocks_at=Tokens(None, kv_at.segment_ids, kv_at.positions),
            at=at,
            top_k=self.config.top_k,
            block_size=1,
            num_blocks=keys,
            num_local=0,
        )

    def options(self, inputs, at):
        return {**super().options(inputs, at), "selected": self.select(inputs, at)}

    def attend_active(self, inputs, active, *, at):
        return self.weigh(inputs, at=at)

    def entries(self):
        return {**super().entries(), "scores": ((self.num_kv_heads, self.config.num_clusters), KV_HEADS)}

    def kept(self, inputs):
        return {**super().kept(inputs), "scores": inputs.scores}

    def recalled(self, inputs, cache):
        return super().recalled(inputs, cache)._replace(scores=cache.entries["scores"])

    def counts(self, inputs, x, *, at):
        """Sums of the queries and keys of each centroid, and how many."""
        q, k = (jax.lax.stop_gradient(y).astype(jnp.float32) for y in inputs.plain)
        real = (at.segment_ids > 0).astype(jnp.float32)
        share = q.shape[2] // self.num_kv_heads
        found = {}
        for name, y, cluster in (("q", q, inputs.cluster), ("k", k, jnp.argmax(inputs.scores, axis=-1))):
            head = jnp.broadcast_to(jnp.arange(y.shape[2]) // (share if name == "q" else 1), cluster.shape)
            weight = jnp.broadcast_to(real[:, :, None], cluster.shape)
            rows = jnp.concatenate([y * weight[..., None], weight[..., None]], axis=-1)
            empty = jnp.zeros((self.num_kv_heads, self.config.num_clusters, rows.shape[-1]), jnp.float32)
            found[name] = empty.at[head, cluster].add(rows)
        return found

    def settle(self, counts):
        old = self.centroids[...]
        means = [counts[name][..., :-1] / jnp.maximum(counts[name][..., -1:], 1) for name in ("q", "k")]
        there = (counts["q"][..., -1:] + counts["k"][..., -1:]) > 0
        moved = self.config.decay * old + (1 - self.config.decay) / 2 * (means[0] + means[1])
        self.centroids[...] = jnp.where(there, _unit(moved), old)


def _normalised(heads: jax.Array) -> jax.Array:
    """`[..., K]` of mean 0 and mean square 1."""
    x = heads.astype(jnp.promote_types(heads.dtype, jnp.float32))
    x = x - x.mean(-1, keepdims=True)
    return (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + _SMALL)).astype(heads.dtype)


def _unit(x: jax.Array) -> jax.Array:
    """`[..., K]` of length 1."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + _SMALL**2)
