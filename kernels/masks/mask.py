"""The mask of attention: which keys a query may see, by position and segment."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Span(NamedTuple):
    """Positions from `low` to `high`, both included; integers or integer arrays."""

    low: Any
    high: Any


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys a query sees, as a rule on positions; hashable, so it can be a static argument of a jitted function.

    A query sees a key when both are in the same segment (padding, id 0, sees nothing and is not seen), when the key is not in its
    future, and when the key is within reach: inside the window, or one of the segment's first tokens.
    Other kinds of reach subclass this and override `reaches`, `tile` and `reach_back`; nothing else knows the kind.
    """

    causal: bool = True
    """A query sees no key at a later position."""

    window_size: int | None = None
    """Keys a query sees, itself included (tokens); without `causal`, as many on the other side. None is no limit."""

    right_window_size: int | None = None
    """Without `causal`: keys a query sees from itself on, itself included. None is as many as on the left."""

    num_sink_tokens: int = 0
    """The first tokens of each segment, visible to every later query of the segment whatever the window, to earlier ones not."""

    dilation: int | None = None
    """Only keys at multiples of this distance are visible, and the window counts those. None is every key."""

    def __post_init__(self) -> None:
        for name in ("window_size", "right_window_size", "dilation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"mask.{name}={value} must be at least 1 (the query itself); use None for no limit")
        if self.num_sink_tokens < 0:
            raise ValueError(f"mask.num_sink_tokens={self.num_sink_tokens} must be at least 0; use 0 for none")
        if self.num_sink_tokens and self.sees_all:
            raise ValueError(
                f"mask.num_sink_tokens={self.num_sink_tokens} needs a window, without which every token is visible; "
                "set window_size or use 0"
            )
        if self.right_window_size is not None and self.causal:
            raise ValueError(
                f"mask.right_window_size={self.right_window_size} lets a query see its future; set causal=False or use None"
            )

    @property
    def sees_all(self) -> bool:
        """Nothing but causality hides a key."""
        return self.window_size is None and self.right_window_size is None and self.dilation is None

    @property
    def alignment(self) -> int:
        """Positions that the rule groups into blocks counted from a segment's start; 1 where only distances matter."""
        return 1

    def reaches(self, q_positions: Array, kv_positions: Array) -> Array:
        """Whether a query position reaches a key position of its segment; broadcasts its arguments."""
        distance = q_positions - kv_positions
        seen = q_positions >= kv_positions if self.causal else distance == distance  # noqa: PLR0124 (all true, of its shape)
        near = self._within(distance)
        return seen if near is None else seen & (near | self._is_sink(distance, kv_positions))

    def tile(self, q: Span, k: Span) -> tuple[Any, Any]:
        """Whether some, and whether every, query of `q` reaches some, and every, key of `k`; may err to some and to not every."""
        distance = Span(q.low - k.high, q.high - k.low)
        left, right = self._limits()
        some, every = distance.high >= -right, distance.low >= -right
        if left is not None:
            some, every = some & (distance.low <= left), every & (distance.high <= left)
        if self.dilation is not None:
            every = every & (self.dilation == 1)
        if self.num_sink_tokens:
            some = some | ((distance.high >= 0) & (k.low < self.num_sink_tokens))
        return some, every

    def reach_back(self) -> int | None:
        """The largest distance back to a visible key, sink tokens aside; None is no limit."""
        return self._limits()[0]

    def dense(self, q_positions: Array, kv_positions: Array, q_segment_ids: Array, kv_segment_ids: Array) -> Array:
        """The boolean mask [..., T, S] of positions and segment ids [..., T] and [..., S]; True is visible."""
        q_segment_ids, kv_segment_ids = q_segment_ids[..., :, None], kv_segment_ids[..., None, :]
        same = (q_segment_ids == kv_segment_ids) & (kv_segment_ids != 0)
        return same & self.reaches(q_positions[..., :, None], kv_positions[..., None, :])

    def key_range(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        """The keys [lo, hi) that queries [start, stop) of the same sequence can see, sink tokens aside; indices, no positions."""
        left = self.reach_back()
        return max(0, start - (num_keys if left is None else left)), min(num_keys, stop + min(num_keys, self._limits()[1]))

    def without_sinks(self) -> Mask:
        """The same rule without sink tokens."""
        return dataclasses.replace(self, num_sink_tokens=0) if self.num_sink_tokens else self

    def _limits(self) -> tuple[int | None, int]:
        """The largest distance back and ahead; without a limit back None, ahead a number beyond any position."""
        stride = self.dilation or 1
        left = None if self.window_size is None else (self.window_size - 1) * stride
        size = self.window_size if self.right_window_size is None else self.right_window_size
        right = 0 if self.causal else (FAR if size is None else (size - 1) * stride)
        return left, right

    def _within(self, distance: Array) -> Array | None:
        """Whether the window, in strides, holds a distance; None where it holds all."""
        if self.sees_all:
            return None
        left, right = self._limits()
        near = distance >= -right
        if left is not None:
            near &= distance <= left
        return near if self.dilation is None else near & (jax.lax.rem(distance, jnp.full_like(distance, self.dilation)) == 0)

    def _is_sink(self, distance: Array, kv_positions: Array) -> Array:
        return (kv_positions < self.num_sink_tokens) & (distance >= 0)


class BlockRule(Mask):
    """Base of masks whose rule goes by blocks of tokens, counted from the segment's start."""

    @property
    def sees_all(self) -> bool:
        """Nothing but causality hides a key."""
        return False


def block_number(positions: Array, block_size: int) -> Array:
    """The block of each position, none negative; in kernels too."""
    if block_size & (block_size - 1) == 0:
        return positions >> (block_size.bit_length() - 1)
    return jax.lax.div(positions, jnp.full_like(positions, block_size))


FAR = 1 << 29
"""Beyond any position, in either direction."""
