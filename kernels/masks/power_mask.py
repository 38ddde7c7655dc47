"""The mask of attention to blocks that lie a power of two back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from plait.kernels.masks.mask import BlockRule, Span, block_number

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class PowerMask(BlockRule):
    """PowerAttention: keys whose block lies 0 or a power of two blocks back, besides the window and the sink tokens.

    Blocks are counted from the segment's start. A query sees O(log T) blocks, and d layers reach every token less than 2^d blocks
    back. Here `window_size=None` adds no window.

    Source: arXiv 2503.03588, block form.
    """

    block_size: int = 128
    """Tokens a block; a multiple of the kernels' tiles, or a divisor, skips most."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"mask.block_size={self.block_size} must be at least 1; use a multiple of 128 for speed")
        if not self.causal or self.dilation is not None or self.right_window_size is not None:
            raise ValueError("PowerMask looks back only: leave causal=True, dilation=None and right_window_size=None")
        super().__post_init__()

    @property
    def alignment(self) -> int:
        """See `Mask.alignment`."""
        return self.block_size

    def reaches(self, q_positions: Array, kv_positions: Array) -> Array:
        """See `Mask.reaches`."""
        distance = q_positions - kv_positions
        back = block_number(q_positions, self.block_size) - block_number(kv_positions, self.block_size)
        near = (back & (back - 1)) == 0  # 0 or a power of two, given that it is not negative
        if self.window_size is not None:
            near |= distance < self.window_size
        return (distance >= 0) & (near | self._is_sink(distance, kv_positions))

    def tile(self, q: Span, k: Span) -> tuple[Any, Any]:
        """See `Mask.tile`."""
        distance = Span(q.low - k.high, q.high - k.low)
        low, high = q.low // self.block_size - k.high // self.block_size, q.high // self.block_size - k.low // self.block_size
        power = high
        for shift in (1, 2, 4, 8, 16):  # all bits below the highest
            power = power | (power >> shift)
        power = power - (power >> 1)  # the largest power of two that is not above `high`, for `high` of at least 1
        some = (low <= 0) | (power >= low)
        if self.window_size is not None:
            some |= distance.low < self.window_size
        if self.num_sink_tokens:
            some |= k.low < self.num_sink_tokens
        alone = (low == high) & (low >= 0) & ((low & (low - 1)) == 0)
        return some & (distance.high >= 0), alone & (distance.low >= 0)

    def reach_back(self) -> int | None:
        """See `Mask.reach_back`."""
        return None
