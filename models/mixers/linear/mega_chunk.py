"""Mega-chunk: attention within fixed chunks of a document, between which only the moving average passes."""

from __future__ import annotations

import dataclasses

from plait.configs.domains import Span
from plait.models.mixers.base import register
from plait.models.mixers.linear.mega import MegaOptions, keys_of_blocks


@register(
    "mega_chunk",
    kind="linear",
    source="Mega: Moving Average Equipped Gated Attention (2209.10655)",
    proof="the authors' cell, in chunks",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MegaChunkConfig(MegaOptions):
    """As `mega`, but a token sees those of its chunk only, tokens 0 to chunk_size - 1 of its document, and so on; linear in the length."""

    chunk_size: Span = 1024
    """Tokens of a chunk, and the distances that the simple bias tells apart."""

    @classmethod
    def example(cls) -> MegaChunkConfig:
        return cls(state_dim=2, expand=1.5, chunk_size=24)

    @property
    def chunk(self) -> int:
        return self.chunk_size

    @property
    def distances(self) -> int:
        return self.chunk_size

    def mean_keys(self, seq_len: int) -> float:
        if not self.on_attention:
            return keys_of_blocks(seq_len, self.chunk)
        whole, rest = divmod(seq_len, self.chunk_size)
        seen = whole * self.chunk_size * (self.chunk_size + 1) / 2 + rest * (rest + 1) / 2
        return seen / seq_len
