"""What attention mixers share that differ from `softmax` in their weights or their projections: cache, rows, heads."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from plait.configs.domains import Base, Channels, Heads
from plait.kernels import Mask, Tokens, attention, attention_rows, weighted_attention, weighted_rows
from plait.kernels.weighted_attention import Rule
from plait.models.axes import BATCH, EMBED, HEADS, KV_HEADS, LENGTH, constrain
from plait.models.build import BuildContext
from plait.models.cache import Cache, Slots
from plait.models.linear import Dense
from plait.models.mixers.base import HeadMixer, MixerConfig
from plait.models.mixers.heads import join_heads, require_divides, resolve_heads, split_heads
from plait.models.rope import rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedConfig(MixerConfig):
    """Options of multi-head attention that every formula for its weights has."""

    num_heads: Heads | None = None
    """Query heads; None gives d_model / head_dim."""
    num_kv_heads: Heads | None = None
    """Key and value heads, a divisor of num_heads (1: MQA); None gives num_heads (MHA)."""
    head_dim: Channels = 64
    """Channels of a head."""
    rope_theta: Base | None = 10_000.0
    """Base of the rotary embedding; None for no position encoding (NoPE)."""

    def check(self) -> None:
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even where rope_theta={self.rope_theta} rotates channels in pairs; "
                f"use {self.head_dim + 1}, or rope_theta=None for NoPE"
            )

    @classmethod
    def example(cls) -> WeightedConfig:
        return cls(num_heads=4, head_dim=16)

    def heads(self, d_model: int) -> tuple[int, int]:
        """`(num_heads, num_kv_heads)` at width `d_model`."""
        num_heads = resolve_heads(self.num_heads, d_model, self.head_dim)
        num_kv_heads = self.num_kv_heads or num_heads
        require_divides(("num_kv_heads", num_kv_heads), ("num_heads", num_heads))
        return num_heads, num_kv_heads

    def pair_flops(self) -> float:
        """Operations for a head, a query and a key that it sees: the logit, and the value's share of the output."""
        return 4.0 * self.head_dim

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return self.pair_flops() * self.heads(d_model)[0] * mean_keys(seq_len)


def mean_keys(seq_len: int) -> float:
    """Keys that a causal query sees, the mean over a sequence."""
    return (seq_len + 1) / 2


class QKV(NamedTuple):
    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, S, Hkv, K]
    v: jax.Array  # [B, S, Hkv, V]
    kv_at: Tokens | None = None  # where the keys stand, when they are not the queries' own tokens
    before: tuple[jax.Array, Tokens] | None = None  # the queries of a rule's halo, when decoding


class Cached(HeadMixer):
    """Attention that decodes from a cache of past tokens; softmax of dot products where `weigh` and `implied` are not overridden.

    Subclasses write `project`, which gives `QKV`, `entries` and `output`; `kept` and `recalled` where the cache holds other things
    than keys and values.
    """

    slots = Slots()

    def __init__(self, ctx: BuildContext):
        self.dtype, self.mask = ctx.compute_dtype, Mask(causal=ctx.causal)

    @abc.abstractmethod
    def entries(self) -> Mapping[str, tuple[tuple[int, ...], str | None]]:
        """What the cache keeps of a token: shape, and the logical axis of its first dimension."""

    def kept(self, inputs: Any) -> Mapping[str, jax.Array]:
        """What the cache keeps of the inputs."""
        return {"k": inputs.k, "v": inputs.v}

    def recalled(self, inputs: Any, cache: Cache) -> Any:
        """The inputs with the cache's tokens as keys."""
        return inputs._replace(k=cache.entries["k"], v=cache.entries["v"], kv_at=cache.at)

    def weigh(self, inputs: Any, *, at: Tokens) -> jax.Array:
        """Head outputs `[B, T, H, V]` of inputs whose keys are the queries' own tokens or, with `kv_at`, others."""
        return attention(inputs.q, inputs.k, inputs.v, at=at, kv_at=inputs.kv_at, mask=self.mask)

    def implied(self, inputs, rows, *, at):
        return attention_rows(inputs.q, inputs.k, rows=rows, at=at, mask=self.mask)

    def init_state(self, batch_size, max_len) -> Any:
        return self.slots.empty(batch_size, max_len, self.entries(), self.dtype)

    def attend(self, inputs, *, at, state):
        o = self.weigh(inputs, at=at)
        return o, None if state is None else self.slots.write(state, self.kept(inputs), at)

    def recall(self, inputs, carry, *, at, state):
        state = self.slots.write(state, self.kept(inputs), at)
        return self.recalled(inputs, state), carry, state

    def attend_step(self, inputs, *, at, state):
        return self.weigh(inputs, at=at), state


class MultiHead(Cached):
    """The usual projections: queries, keys, values and output, by heads."""

    def __init__(self, config: WeightedConfig, d_model: int, ctx: BuildContext):
        super().__init__(ctx)
        self.config = config
        self.num_heads, self.num_kv_heads = config.heads(d_model)
        width, kv_width = self.num_heads * config.head_dim, self.num_kv_heads * config.head_dim
        self.q = Dense(ctx, d_model, width, (EMBED, HEADS), heads=(1, self.num_heads))
        self.k = Dense(ctx, d_model, kv_width, (EMBED, KV_HEADS), heads=(1, self.num_kv_heads))
        self.v = Dense(ctx, d_model, kv_width, (EMBED, KV_HEADS), heads=(1, self.num_kv_heads))
        self.o = Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads))

    def prepared(self, q: jax.Array, k: jax.Array, *, at: Tokens) -> tuple[jax.Array, jax.Array]:
        """Queries `[B, T, H, K]` and keys `[B, T, Hkv, K]` as their products and the cache take them: with their positions."""
        if self.config.rope_theta is None:
            return q, k
        return rotate(q, at.positions, self.config.rope_theta), rotate(k, at.positions, self.config.rope_theta)

    def project(self, x, *, at, state):
        def heads(dense: Dense, number: int, axis: str) -> jax.Array:
            return constrain(split_heads(dense(x), number), (BATCH, LENGTH, axis, None))

        q, k = heads(self.q, self.num_heads, HEADS), heads(self.k, self.num_kv_heads, KV_HEADS)
        return QKV(*self.prepared(q, k, at=at), heads(self.v, self.num_kv_heads, KV_HEADS)), state

    def entries(self):
        one = ((self.num_kv_heads, self.config.head_dim), KV_HEADS)
        return {"k": one, "v": one}

    def output(self, o):
        return self.o(join_heads(o))


class Weighted(MultiHead):
    """Multi-head attention by a rule."""

    def __init__(self, config: WeightedConfig, d_model: int, ctx: BuildContext, rule: Rule):
        super().__init__(config, d_model, ctx)
        self.rule = rule

    def parameters(self) -> Any:
        """The arrays of the rule."""
        return None

    def weigh(self, inputs, *, at):
        return weighted_attention(*inputs[:3], at=at, kv_at=inputs.kv_at, before=inputs.before, **self._rule)

    def implied(self, inputs, rows, *, at):
        return weighted_rows(inputs.q, inputs.k, rows, at=at, **self._rule)

    @property
    def _rule(self) -> dict[str, Any]:
        return {"rule": self.rule, "parameters": self.parameters(), "mask": self.mask}
