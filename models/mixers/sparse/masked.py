"""What sparse mixers share whose pattern is known beforehand: softmax attention under a mask, the same for all heads or one a head.

A mixer is then its config: the mask, what decoding must keep, and its numbers.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any

import numpy as np

from plait.kernels import ChunkMask, HeadMasks, Mask
from plait.models.axes import HEADS, KV_HEADS
from plait.models.build import BuildContext
from plait.models.layers.cache import Slots
from plait.models.mixers.full.dot_product import DotProduct, GroupedConfig
from plait.models.mixers.full.weighted import QKV


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedConfig(GroupedConfig, abc.ABC):
    """`o_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j` over the keys that a mask shows."""

    @abc.abstractmethod
    def mask(self, num_heads: int, causal: bool) -> Mask | HeadMasks:
        """Which tokens of its document a query sees; raises ValueError where that does not fit so many heads."""

    def slots(self) -> Slots:
        """Where decoding keeps keys and values: all of them, unless none beyond a window is ever seen again."""
        return Slots()

    def seen_keys(self, d_model: int, seq_len: int) -> float:
        return mean_visible(self.mask(self.count_heads(d_model), True), seq_len)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        full = super().mixing_flops(d_model, seq_len)
        return full * self.seen_keys(d_model, seq_len) / mean_visible(Mask(), seq_len)

    def build(self, d_model: int, ctx: BuildContext) -> Masked:
        return Masked(self, d_model, ctx)


class Masked(DotProduct):
    """See `MaskedConfig`."""

    def __init__(self, config: MaskedConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        _, self.num_kv_heads = config.heads(d_model)
        self.mask: Any = config.mask(self.num_heads, ctx.causal)
        self.slots = config.slots()
        heads = (self.num_heads, HEADS), (self.num_kv_heads, KV_HEADS), (self.num_kv_heads, KV_HEADS)
        self.q, self.k, self.v = (self.projection(ctx, d_model, n, config.head_dim, axis) for n, axis in heads)
        self.o = self.projection_back(ctx, d_model, config.head_dim)

    def project(self, x, *, at, state):
        placed = self.placed(x, at)
        q = self.turned(self.split(self.q(placed), self.num_heads), at)
        k = self.turned(self.split(self.k(placed), self.num_kv_heads, KV_HEADS), at)
        return QKV(q, k, self.split(self.v(x), self.num_kv_heads, KV_HEADS)), state


@functools.lru_cache(maxsize=256)
def mean_visible(mask: Mask | HeadMasks, seq_len: int) -> float:
    """Keys that a query sees of a sequence, looking back; the mean over queries, and heads."""
    if isinstance(mask, HeadMasks):
        return float(np.mean([mean_visible(one, seq_len) for one in mask.masks]))
    i, stride, sinks = np.arange(seq_len), mask.dilation or 1, mask.num_sink_tokens
    if isinstance(mask, ChunkMask):
        low = (i + mask.shift) // mask.chunk_size * mask.chunk_size - mask.kv_shift
        high, same = np.minimum(low + mask.chunk_size - 1, i), i + mask.shift - mask.kv_shift
    else:
        low = np.zeros_like(i) if mask.window_size is None else i - (mask.window_size - 1) * stride
        high = same = i
    low = np.maximum(low, sinks)  # sink tokens are counted apart
    low += (same - low) % stride
    near = np.where(low <= high, (high - low) // stride + 1, 0)
    return float(np.mean(near + np.minimum(sinks, i + 1)))
