"""The mask of attention inside chunks of a document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from plait.kernels.masks.mask import BlockRule, Span, block_number

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class ChunkMask(BlockRule):
    """Keys of the query's own chunk, besides the sink tokens: `floor((i + shift) / C) == floor((j + kv_shift) / C)`.

    Chunks are counted from the segment's start. A shift moves their borders, so that the first chunk has `C - shift` tokens and nothing
    wraps around; with another shift of the keys, queries meet keys of the chunk before. Shifts are at least 0: tokens move on.
    With `dilation`, the shifted places must be multiples of it apart.

    Source: S^2-Attn, arXiv 2309.12307 (both shifts), SCCA, 2312.07305 (that of the keys), LongNet, 2307.02486 (none).
    """

    chunk_size: int = 128
    """Tokens a chunk."""

    shift: int = 0
    """Tokens by which queries are moved on before they are cut into chunks."""

    kv_shift: int = 0
    """The same of keys."""

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"mask.chunk_size={self.chunk_size} must be at least 1; use a multiple of 128 for speed")
        for name in ("shift", "kv_shift"):
            if not 0 <= (value := getattr(self, name)) < self.chunk_size:
                raise ValueError(
                    f"mask.{name}={value} must be from 0 to chunk_size - 1 = {self.chunk_size - 1}; use the remainder"
                )
        if self.window_size is not None or self.right_window_size is not None:
            raise ValueError("ChunkMask has chunks for a window: leave window_size=None and right_window_size=None")
        super().__post_init__()

    @property
    def alignment(self) -> int:
        """See `Mask.alignment`."""
        return self.chunk_size

    def reaches(self, q_positions: Array, kv_positions: Array) -> Array:
        """See `Mask.reaches`."""
        distance = q_positions - kv_positions
        q_places, kv_places = q_positions + self.shift, kv_positions + self.kv_shift
        near = block_number(q_places, self.chunk_size) == block_number(kv_places, self.chunk_size)
        if self.dilation is not None:
            apart = q_places - kv_places
            near &= jax.lax.rem(apart, jax.numpy.full_like(apart, self.dilation)) == 0
        if self.num_sink_tokens:
            near |= self._is_sink(distance, kv_positions)
        return near & (distance >= 0) if self.causal else near

    def tile(self, q: Span, k: Span) -> tuple[Any, Any]:
        """See `Mask.tile`."""
        low, high = ((x + self.shift) // self.chunk_size for x in q)
        kv_low, kv_high = ((x + self.kv_shift) // self.chunk_size for x in k)
        some, every = (low <= kv_high) & (kv_low <= high), (low == kv_high) & (kv_low == high)
        if self.dilation is not None:
            every = every & (self.dilation == 1)
        if self.num_sink_tokens:
            some = some | (k.low < self.num_sink_tokens)
        if self.causal:
            some, every = some & (q.high >= k.low), every & (q.low >= k.high)
        return some, every

    def _limits(self) -> tuple[int | None, int]:
        size, ahead = self.chunk_size - 1, self.shift - self.kv_shift
        return max(size - ahead, 0), 0 if self.causal else max(size + ahead, 0)
