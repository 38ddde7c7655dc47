"""Caches of past tokens that attention decodes from: whole, or a ring behind sink tokens where a window ends what is seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from plait.kernels import Tokens
from plait.models.axes import BATCH, constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What is kept of past tokens, slot by slot."""

    entries: Mapping[str, jax.Array]
    """`[B, S, ...]` each."""
    positions: jax.Array
    """int32 `[B, S]`; -1 marks an empty slot."""

    @property
    def at(self) -> Tokens:
        """The slots as keys; empty ones are padding."""
        return Tokens(None, (self.positions >= 0).astype(jnp.int32), self.positions)


@dataclasses.dataclass(frozen=True)
class Slots:
    """Which slot a position takes. With a window, `num_sink_tokens` slots of their own and then a ring of `window_size`."""

    window_size: int | None = None
    num_sink_tokens: int = 0

    def empty(
        self,
        batch_size: int,
        max_len: int,
        entries: Mapping[str, tuple[tuple[int, ...], str | None]],
        dtype: jax.typing.DTypeLike,
    ) -> Cache:
        """A cache for sequences of at most `max_len` tokens.

        Args:
            entries: for each name its shape a token, and the logical axis of that shape's first dimension.
        """
        slots = max_len if self.window_size is None else min(max_len, self.window_size + self.num_sink_tokens)

        def one(shape: tuple[int, ...], axis: str | None) -> jax.Array:
            return constrain(jnp.zeros((batch_size, slots, *shape), dtype), (BATCH, None, axis, *[None] * (len(shape) - 1)))

        positions = constrain(jnp.full((batch_size, slots), -1, jnp.int32), (BATCH, None))
        return Cache({name: one(*entry) for name, entry in entries.items()}, positions)

    def write(self, cache: Cache, new: Mapping[str, jax.Array], at: Tokens) -> Cache:
        """The cache with `new` `[B, T, ...]` of the tokens in the last token's segment."""
        positions, slots = at.positions, at.positions
        keep = current(at)
        if self.window_size is not None:
            sinks = self.num_sink_tokens
            slots = jnp.where(positions < sinks, positions, sinks + (positions - sinks) % self.window_size)
            keep = keep & ((positions < sinks) | (positions > positions[:, -1:] - self.window_size))
        slots = jnp.where(keep, slots, cache.positions.shape[1])  # out of range: dropped
        row = jnp.arange(positions.shape[0])[:, None]

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[row, slots].set(new.astype(old.dtype), mode="drop")

        return Cache({name: put(cache.entries[name], new[name]) for name in cache.entries}, put(cache.positions, positions))


def current(at: Tokens) -> jax.Array:
    """bool `[B, T]`: the tokens in the last token's segment, which decoding goes on with."""
    if at.segment_ids is None:
        return jnp.ones_like(at.positions, bool)
    return (at.segment_ids > 0) & (at.segment_ids == at.segment_ids[:, -1:])
