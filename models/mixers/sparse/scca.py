"""Shifted cross chunk attention: heads whose keys and values are moved by parts of a chunk, or by tokens of a stride."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from plait.configs.domains import Span
from plait.kernels import ChunkMask, HeadMasks
from plait.models.layers.cache import Slots
from plait.models.mixers.base import Direction, register
from plait.models.mixers.sparse.masked import MaskedConfig


@register(
    "scca",
    kind="sparse",
    source="SCCA: Shifted Cross Chunk Attention for long contextual semantic expansion (2312.07305)",
    proof="keys and values moved and cut into chunks in float64, what wraps around left out",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SCCAConfig(MaskedConfig):
    """Softmax attention inside chunks of C tokens, to which a head's keys and values, not its queries, have been moved on by its shift s.

    A chunk's queries then see keys of their chunk and the last s of the one before, and not the last s of their own. `fixed`: s = C / 2
    in the second half of the heads, 0 in the first; `flow`: s = h C / H in head h of H, so that the heads together see all. With
    `dilation` r (SDA), s = h mod r tokens, and of a chunk the places are seen that stand a multiple of r apart: each head sees tokens of
    another remainder. The paper says no more of the shifts; that they move on, and that nothing wraps around, is so here because keys
    moved the other way are a causal query's future.
    """

    directions: ClassVar[tuple[Direction, ...]] = ("causal", "bidirectional")

    chunk_size: Span = 2048
    """Tokens a chunk, C, counted from the start of the document."""
    shifts: Literal["fixed", "flow"] = "fixed"
    """Whether half of the heads are moved by half a chunk, or each by a part of its own."""
    dilation: Span | None = None
    """r of shifted dilated attention (SDA), which says the shifts then; None for dense chunks."""

    def check(self) -> None:
        super().check()
        if self.dilation is not None and self.dilation > self.chunk_size:
            raise ValueError(f"dilation={self.dilation} must be at most chunk_size={self.chunk_size}; use a divisor of that")

    @classmethod
    def example(cls) -> SCCAConfig:
        return cls(num_heads=4, head_dim=16, chunk_size=16)

    def mask(self, num_heads: int, causal: bool) -> HeadMasks:
        if self.dilation is not None:
            shifts = [h % self.dilation for h in range(num_heads)]
        elif self.shifts == "flow":
            shifts = [h * self.chunk_size // num_heads for h in range(num_heads)]
        else:
            shifts = [self.chunk_size // 2 if 2 * h >= num_heads else 0 for h in range(num_heads)]
        chunk = ChunkMask(causal=causal, chunk_size=self.chunk_size, dilation=self.dilation)
        return HeadMasks(tuple(dataclasses.replace(chunk, kv_shift=shift) for shift in shifts))

    def slots(self) -> Slots:
        return Slots(2 * self.chunk_size)
