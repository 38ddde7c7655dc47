"""What full mixers share whose weights are a softmax of dot products: one op, a cache of what keys and values are made of, and the
projection back. A mixer is then its config and how it makes, shares and combines queries, keys and values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax

from plait.configs.domains import Base, Channels, Heads
from plait.kernels import Mask, Tokens, attention, attention_rows, column_mass, first_masses, routed_attention
from plait.models.axes import BATCH, EMBED, HEADS, KV_HEADS, LENGTH, constrain
from plait.models.build import BuildContext
from plait.models.cache import Cache, Slots
from plait.models.linear import Dense
from plait.models.mixers.base import Direction, HeadMixer, MixerConfig
from plait.models.mixers.heads import join_heads, require_divides, resolve_heads, split_heads
from plait.models.rope import rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class DotProductConfig(MixerConfig):
    """Heads that weigh values by a softmax of scaled dot products."""

    directions: ClassVar[tuple[Direction, ...]] = ("causal", "bidirectional")

    num_heads: Heads | None = None
    """Heads; None gives d_model / head_dim."""
    head_dim: Channels = 64
    """Channels of a head."""

    def count_heads(self, d_model: int) -> int:
        """Heads at width `d_model`."""
        return resolve_heads(self.num_heads, d_model, self.head_dim)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return 2.0 * sum(self.weighed(d_model)) * (seq_len + 1) / 2

    def weighed(self, d_model: int) -> tuple[int, int]:
        """Channels of all queries, and of all values that they weigh."""
        width = self.count_heads(d_model) * self.head_dim
        return width, width


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig(DotProductConfig):
    """Whose queries and keys are rotated by their positions."""

    rope_theta: Base | None = 10_000.0
    """Base of the rotary embedding; None for no position encoding (NoPE)."""

    def check(self) -> None:
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even where rope_theta={self.rope_theta} rotates channels in pairs; "
                f"use {self.head_dim + 1}, or rope_theta=None for NoPE"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedConfig(RotaryConfig):
    """Whose keys and values are shared by groups of heads."""

    num_kv_heads: Heads | None = None
    """Key and value heads, a divisor of num_heads; None gives num_heads."""

    def heads(self, d_model: int) -> tuple[int, int]:
        """`(num_heads, num_kv_heads)` at width `d_model`."""
        num_heads = self.count_heads(d_model)
        num_kv_heads = self.num_kv_heads or num_heads
        require_divides(("num_kv_heads", num_kv_heads), ("num_heads", num_heads))
        return num_heads, num_kv_heads


class DotProductState(NamedTuple):
    """Decode memory."""

    cache: Cache
    convs: Mapping[str, jax.Array]
    """The last inputs of each short convolution."""


class Projected(NamedTuple):
    """Queries, keys and values; a mixer that needs more has a class of its own with these fields."""

    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, S, Hkv, K]
    v: jax.Array  # [B, S, Hkv, V]
    kept: Mapping[str, jax.Array]  # what the cache keeps of the new tokens, [B, T, ...]
    kv_at: Tokens | None = None  # where the keys stand, when they are a cache's


class DotProduct(HeadMixer):
    """Subclasses make their projections, write `project`, and `keys_and_values` where the cache keeps something else."""

    config: Any
    num_kv_heads: int
    scale: float | None = None
    """Multiplies the dot products; None for `K^-1/2`."""
    convs: ClassVar[tuple[str, ...]] = ()
    """Attributes that are short convolutions."""

    def __init__(self, config: DotProductConfig, d_model: int, ctx: BuildContext):
        self.config, self.num_heads, self.dtype = config, config.count_heads(d_model), ctx.compute_dtype
        self.mask, self.slots = Mask(causal=ctx.causal), Slots()

    @staticmethod
    def projection(ctx: BuildContext, d_model: int, heads: int, channels: int, axis: str = HEADS) -> Dense:
        """A projection to heads."""
        return Dense(ctx, d_model, heads * channels, (EMBED, axis), heads=(1, heads))

    def projection_back(self, ctx: BuildContext, d_model: int, channels: int) -> Dense:
        """The projection of the finished heads to the residual stream."""
        width = self.num_heads * channels
        return Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads))

    @staticmethod
    def split(y: jax.Array, heads: int, axis: str = HEADS) -> jax.Array:
        """`[B, T, H * K]` to `[B, T, H, K]`, laid out by head."""
        return constrain(split_heads(y, heads), (BATCH, LENGTH, axis, None))

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """`x` `[B, T, H, K]` with its positions."""
        return x if self.config.rope_theta is None else rotate(x, positions, self.config.rope_theta)

    def convolve(
        self, streams: Mapping[str, jax.Array], *, at: Tokens, state: DotProductState | None
    ) -> tuple[list[jax.Array], DotProductState | None]:
        """Each stream `[B, T, C]` through the convolution of its name, and the state with their last inputs."""
        old = {} if state is None else state.convs
        found = {name: getattr(self, name)(y, at=at, state=old.get(name)) for name, y in streams.items()}
        if state is not None:
            state = state._replace(convs={name: last for name, (_, last) in found.items()})
        return [y for y, _ in found.values()], state

    def keys_and_values(self, kept: Mapping[str, jax.Array], positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[B, S, Hkv, .]` of what the cache keeps of tokens at `positions` `[B, S]`."""
        return kept["k"], kept["v"]

    def entries(self) -> Mapping[str, tuple[tuple[int, ...], str | None]]:
        """Shape a token of what the cache keeps, and the axis of that shape's first dimension."""
        one = ((self.num_kv_heads, self.config.head_dim), KV_HEADS)
        return {"k": one, "v": one}

    def options(self, inputs: Any) -> dict[str, Any]:
        """Those of the op."""
        return {"mask": self.mask, "scale": self.scale}

    def weigh(self, inputs: Any, *, at: Tokens) -> jax.Array:
        """Weighted sums of values, `[B, T, H, V]`."""
        return attention(inputs.q, inputs.k, inputs.v, at=at, kv_at=inputs.kv_at, **self.options(inputs))

    def attend(self, inputs, *, at, state):
        if state is not None:
            state = state._replace(cache=self.slots.write(state.cache, inputs.kept, at))
        return self.weigh(inputs, at=at), state

    def attend_active(self, inputs, active, *, at):
        return routed_attention(inputs.q, inputs.k, inputs.v, active, at=at, **self.options(inputs))

    def recall(self, inputs, carry, *, at, state):
        cache = self.slots.write(state.cache, inputs.kept, at)
        k, v = self.keys_and_values(cache.entries, cache.positions)
        return inputs._replace(k=k, v=v, kv_at=cache.at), carry, state._replace(cache=cache)

    def attend_step(self, inputs, *, at, state):
        return self.weigh(inputs, at=at), state

    def init_state(self, batch_size, max_len):
        convs = {name: getattr(self, name).init_state(batch_size) for name in self.convs}
        return DotProductState(self.slots.empty(batch_size, max_len, self.entries(), self.dtype), convs)

    def output(self, o):
        return self.o(join_heads(o))

    def implied(self, inputs, rows, *, at):
        return attention_rows(inputs.q, inputs.k, rows=rows, at=at, **self.options(inputs))

    def observe(self, inputs, x, *, at):
        options = {**self.options(inputs), "at": at}
        _, stats = attention(inputs.q, inputs.k, inputs.v, return_stats=True, **options)
        masses = {
            op.__name__: functools.partial(op, inputs.q, inputs.k, stats.lse, **options) for op in (first_masses, column_mass)
        }
        return {"attention": stats, **masses}
