"""Sequences cut over devices: what an op does when each device holds a contiguous part of every row (context parallelism)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

Array = jax.Array
Exchange = Literal["gather", "ring", "all_to_all"]
"""All keys and values, and what every part does to a state, on every device (LASP-2 and its LASP-2H); the same handed on from device to
device (ring attention, arXiv 2310.01889, and LASP, 2404.02882); or whole sequences of some heads on each (Ulysses, 2309.14509)."""


@dataclass(frozen=True)
class Parts:
    """The devices that hold the parts of a sequence, in order. Its methods run on each device, inside `jax.shard_map`.

    Parts are [B, T / count, ...]. What is sent is differentiated: gradients travel back the same way.
    """

    axes: tuple[str, ...]
    """Mesh axes, outermost first."""
    count: int
    exchange: Exchange = "gather"
    """How tokens of all parts meet where an op needs that and can choose."""

    @property
    def index(self) -> Array:
        """The number of this device's part, int32."""
        return jax.lax.axis_index(self.axes)

    def gather(self, x: Array) -> Array:
        """The whole sequence [B, T, ...] from its parts."""
        return jax.lax.all_gather(x, self.axes, axis=1, tiled=True)

    def stack(self, x: Array) -> Array:
        """Every device's x, [count, ...]."""
        return jax.lax.all_gather(x, self.axes)

    def own(self, x: Array) -> Array:
        """This device's part of a whole sequence [B, T, ...]."""
        length = x.shape[1] // self.count
        return jax.lax.dynamic_slice_in_dim(x, self.index * length, length, axis=1)

    def by_heads(self, x: Array) -> Array:
        """Whole sequences [B, T, H / count, ...] of this device's heads, from parts [B, T / count, H, ...] of all."""
        return jax.lax.all_to_all(x, self.axes, split_axis=2, concat_axis=1, tiled=True)

    def by_tokens(self, x: Array) -> Array:
        """The inverse of `by_heads`."""
        return jax.lax.all_to_all(x, self.axes, split_axis=1, concat_axis=2, tiled=True)

    def own_heads(self, x: Array) -> Array:
        """What `by_heads` leaves here, of [H]."""
        heads = x.shape[0] // self.count
        return jax.lax.dynamic_slice_in_dim(x, self.index * heads, heads)

    def passed_on(self, x: Array) -> Array:
        """x of the device before, the last one's on the first."""
        return jax.lax.ppermute(x, self.axes, [(i, (i + 1) % self.count) for i in range(self.count)])

    def before(self, x: Array, length: int) -> Array:
        """The `length` tokens before this part, [B, length, ...]; zeros before the first token."""
        pieces: list[Array] = []
        distance, left = 1, length
        while left > 0:
            piece = x[:, -min(left, x.shape[1]) :]
            hops = [(i, i + distance) for i in range(self.count - distance)]
            pieces.insert(0, jax.lax.ppermute(piece, self.axes, hops) if hops else jnp.zeros_like(piece))
            distance, left = distance + 1, left - piece.shape[1]
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)

    def balanced(self, x: Array) -> Array:
        """Swaps second halves with the part at the other end, so that causal work is even: part i has halves 2i and 2 count - 1 - 2i.

        Its own inverse.
        """
        first, second = jnp.split(x, 2, axis=1)
        mirrored = jax.lax.ppermute(second, self.axes, [(i, self.count - 1 - i) for i in range(self.count)])
        return jnp.concatenate([first, mirrored], axis=1)

    def of_last(self, x: Array, holds: Array, otherwise: Array) -> Array:
        """x [B, ...] of the last part for which `holds`, bool [B]; the same on every device."""
        every = self.stack(holds)
        last = jnp.max(jnp.where(every, jnp.arange(self.count)[:, None], -1), axis=0)
        wide = lambda mask: mask.reshape(-1, *[1] * (x.ndim - 1))
        found = jax.lax.psum(jnp.where(wide(last == self.index), x, 0), self.axes)
        return jnp.where(wide(last >= 0), found, otherwise)


@dataclass(frozen=True)
class ContextRule:
    """How an op runs on parts of sequences."""

    run: Callable[[Callable[[Any], Any], Parts, Any], Any]
    """`run(op, parts, call)` with each device's call; `op` computes one as if it were all."""

    unsupported: Callable[[int, Any], str | None] = lambda count, call: None
    """Takes the whole call after the number of parts; the reason why it cannot be cut, or None."""


def ends(ids: Array) -> Array:
    """The segment ids of each row's first and last tokens that are not padding, [B, 2] of [B, T]; 0 where there are none."""
    real = ids != 0
    index = jnp.arange(ids.shape[1])
    first, last = jnp.argmax(real, axis=1), jnp.max(jnp.where(real, index, 0), axis=1)
    return jnp.take_along_axis(ids, jnp.stack([first, last], axis=1), axis=1)
