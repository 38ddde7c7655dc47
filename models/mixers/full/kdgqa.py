"""Grouped attention whose groups have as many queries as their keys are large."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Steps
from plait.kernels import Tokens
from plait.models.axes import KV_HEADS
from plait.models.build import Buffer, BuildContext
from plait.models.mixers.base import register
from plait.models.mixers.full.dot_product import DotProduct, GroupedConfig

_KEEP = 0.1  # of the average, in a move


@register(
    "kdgqa",
    kind="full",
    source="Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention (2408.08454)",
    proof="the authors' layer",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KDGQAConfig(GroupedConfig):
    """Softmax attention where query head h uses key and value head g(h); group g has `round(H s_g / sum s)` heads, by its keys' norms.

    With n_g the sum over sequences of the Frobenius norm of the keys of head g: s = (n - min n) / (max n - min n) for `norm` (KDGQA,
    where the smallest group gets no query), |n - n_before| for `difference` and 0.9 n + 0.1 s_before for `average` (both DGQA).
    A sum that is not H is mended at the largest or smallest group, where DGQA's code draws one at random.

    The paper takes n from the batch at hand, so that an output depends on the rest of its batch and on its own future. Here n is that
    of the last step: groups move once a step, by `settle`, and stand still in evaluation and decoding, which therefore agree.
    """

    statistic: Literal["norm", "difference", "average"] = "norm"
    """What groups are sized by."""
    every: Steps = 1
    """Steps from one move of the groups to the next (DGQA: 300)."""

    @classmethod
    def example(cls) -> KDGQAConfig:
        return cls(num_heads=4, num_kv_heads=2, head_dim=16)

    def build(self, d_model: int, ctx: BuildContext) -> KDGQA:
        return KDGQA(self, d_model, ctx)


def allocate(share: jax.Array, num_heads: int) -> jax.Array:
    """How many of `num_heads` queries each group gets, int32 `[..., G]`, in proportion to `share` `[..., G]`; alike where all are 0."""
    groups = share.shape[-1]
    total = share.sum(-1, keepdims=True)
    part = jnp.where(total > 0, share / jnp.where(total > 0, total, 1), 1 / groups)
    count = jnp.round(part * num_heads).astype(jnp.int32)

    def mend(_: int, count: jax.Array) -> jax.Array:
        over = count.sum(-1, keepdims=True) - num_heads
        most, least = (jax.nn.one_hot(pick(count, axis=-1), groups, dtype=jnp.int32) for pick in (jnp.argmax, jnp.argmin))
        return count - jnp.where(over > 0, most, 0) + jnp.where(over < 0, least, 0)

    return jax.lax.fori_loop(0, groups, mend, count)  # rounding is off by half a group's query at most


class Allotted(NamedTuple):
    """Keys and values of each query, and of each group."""

    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, S, H, K]
    v: jax.Array  # [B, S, H, K]
    groups: Mapping[str, jax.Array]  # of the new tokens, [B, T, G, K]
    kv_at: Tokens | None = None


class KDGQA(DotProduct):
    """See `KDGQAConfig`."""

    def __init__(self, config: KDGQAConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        _, self.num_kv_heads = config.heads(d_model)
        self.q = self.projection(ctx, d_model, self.num_heads, config.head_dim)
        self.k, self.v = (self.projection(ctx, d_model, self.num_kv_heads, config.head_dim, KV_HEADS) for _ in range(2))
        self.o = self.projection_back(ctx, d_model, config.head_dim)
        groups = (self.num_kv_heads,)
        self.sizes = Buffer(jnp.full(groups, self.num_heads // self.num_kv_heads, jnp.int32), axes=(None,))
        self.before = Buffer(jnp.zeros(groups, jnp.float32), axes=(None,))
        self.steps = Buffer(jnp.zeros((), jnp.int32), axes=())

    def kv_of_q(self) -> jax.Array:
        """The key and value head of each query head, int32 `[H]`."""
        return (jnp.arange(self.num_heads)[:, None] >= jnp.cumsum(self.sizes[...])[None, :]).sum(-1)

    def project(self, x, *, at, state):
        placed = self.placed(x, at)
        q = self.turned(self.split(self.q(placed), self.num_heads), at)
        k = self.turned(self.split(self.k(placed), self.num_kv_heads, KV_HEADS), at)
        groups = {"k": k, "v": self.split(self.v(x), self.num_kv_heads, KV_HEADS)}
        return Allotted(q, *self.of_queries(groups), groups), state

    def of_queries(self, groups: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The key and the value of each query head, `[B, S, H, K]`."""
        k, v = (jnp.take(groups[name], self.kv_of_q(), axis=2) for name in ("k", "v"))
        return k, v

    def kept(self, inputs):
        return inputs.groups

    def recalled(self, inputs, cache):
        k, v = self.of_queries(cache.entries)
        return inputs._replace(k=k, v=v, kv_at=cache.at)

    def counts(self, inputs, x, *, at):
        real = (at.segment_ids > 0).astype(jnp.float32)[:, :, None]
        k = jax.lax.stop_gradient(inputs.groups["k"]).astype(jnp.float32)
        return {"key_norms": jnp.sqrt((jnp.square(k).sum(-1) * real).sum(1)).sum(0)}

    def settle(self, counts):
        """Sizes the groups by the keys of a step."""
        n, before, statistic = counts["key_norms"], self.before[...], self.config.statistic
        if statistic == "norm":
            share = n - n.min(-1, keepdims=True)  # what the paper divides it by cancels
        else:
            share = jnp.abs(n - before) if statistic == "difference" else (1 - _KEEP) * n + _KEEP * before
        due = (self.steps[...] % self.config.every == 0)[..., None]
        self.sizes[...] = jnp.where(due, allocate(share, self.num_heads), self.sizes[...])
        self.before[...] = jnp.where(due, share if statistic == "average" else n, before)
        self.steps[...] += 1
