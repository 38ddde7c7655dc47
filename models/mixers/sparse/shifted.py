"""Shifted sparse attention: groups of tokens, whose borders other heads have in the middle of theirs."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from plait.configs.domains import Heads, SomeSpan, Span
from plait.kernels import ChunkMask, HeadMasks
from plait.models.layers.cache import Slots
from plait.models.mixers.base import Direction, register
from plait.models.mixers.sparse.masked import MaskedConfig


@register(
    "shifted",
    kind="sparse",
    source="S^2-Attn of LongLoRA (2309.12307); SF-Attn of SinkLoRA (2406.05678)",
    proof="the authors' roll, groups and roll back in float64, what wraps around left out",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiftedConfig(MaskedConfig):
    """S^2-Attn: softmax attention inside groups of G tokens; the last heads' groups are moved by G / 2, so that they join neighbours.

    The moved groups have G / 2, G, ..., G tokens: the authors' roll also brings a sequence's last and first tokens into one group, where
    the first see the end under a causal mask, and that is left out here. SF-Attn: fewer heads are moved, and the first tokens of a
    document are seen by all later ones. The authors train with it and then attend to all: give the weights to `softmax` for that; this
    layer decodes as it trains.
    """

    directions: ClassVar[tuple[Direction, ...]] = ("causal", "bidirectional")

    group_size: Span = 2048
    """Tokens a group, G, counted from the start of the document; as published, a quarter of the training length."""
    num_shifted_heads: Heads | None = None
    """Heads, the last ones, whose groups are moved; None gives half of them, as in S^2-Attn."""
    num_sink_tokens: SomeSpan = 0
    """Leading tokens of each document that stay visible to all later ones, as in SF-Attn."""

    @classmethod
    def example(cls) -> ShiftedConfig:
        return cls(num_heads=4, head_dim=16, group_size=16)

    def mask(self, num_heads: int, causal: bool) -> HeadMasks:
        moved = num_heads // 2 if self.num_shifted_heads is None else self.num_shifted_heads
        if moved > num_heads:
            raise ValueError(f"num_shifted_heads={moved} must be at most num_heads={num_heads}; use {num_heads // 2}")
        shifts = [0] * (num_heads - moved) + [self.group_size // 2] * moved
        group = ChunkMask(causal=causal, chunk_size=self.group_size, num_sink_tokens=self.num_sink_tokens)
        return HeadMasks(tuple(dataclasses.replace(group, shift=shift, kv_shift=shift) for shift in shifts))

    def slots(self) -> Slots:
        return Slots(self.group_size, self.num_sink_tokens)
