"""PowerAttention: each query sees its own block and those a power of two blocks back, so that depth reaches everything."""

from __future__ import annotations

import dataclasses
import functools

from plait.configs.domains import SomeSpan, Span
from plait.kernels import PowerMask
from plait.models.layers.cache import Slots
from plait.models.mixers.base import register
from plait.models.mixers.full.softmax import SoftmaxConfig


@register(
    "power",
    kind="sparse",
    source="PowerAttention: Exponentially Scaling of Receptive Fields (2503.03588)",
    proof="masks by hand, depth's reach",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerConfig(SoftmaxConfig):
    """Softmax attention to the keys whose block lies 0, 1, 2, 4, 8, ... blocks back, besides the window and the sink tokens.

    A query sees O(log T) blocks, and d layers reach every token less than 2^d blocks back. Blocks ahead are not
    defined: it looks back only.
    """

    directions = ("causal",)
    sees_all = False

    block_size: Span = 128
    """Tokens a block, counted from the start of the document."""
    num_sink_tokens: SomeSpan = 0
    """Leading tokens of each document that stay visible."""

    @classmethod
    def example(cls) -> PowerConfig:
        return cls(num_heads=4, head_dim=16, block_size=4)

    def mask(self, causal: bool = True) -> PowerMask:
        return PowerMask(
            causal=causal, window_size=self.window_size, num_sink_tokens=self.num_sink_tokens, block_size=self.block_size
        )

    def slots(self) -> Slots:
        return Slots()

    def seen_keys(self, d_model: int, seq_len: int) -> float:
        return _mean_keys(self, seq_len)


@functools.lru_cache(maxsize=64)
def _mean_keys(config: PowerConfig, seq_len: int) -> float:
    """Visible keys of a query, the mean over a sequence."""
    total = 0
    for query in range(seq_len):
        block, spans = query // config.block_size, [(0, config.num_sink_tokens)]
        back = [0, *(1 << i for i in range(block.bit_length()))]
        spans += [((block - n) * config.block_size, (block - n + 1) * config.block_size) for n in back if n <= block]
        if config.window_size is not None:
            spans.append((query + 1 - config.window_size, query + 1))
        end = 0
        for start, stop in sorted(spans):
            total += max(min(stop, query + 1) - max(start, end), 0)
            end = max(end, min(stop, query + 1))
    return total / seq_len
