"""Longformer: a window, dilated in some heads, and a document's first tokens, which see and are seen by all."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from plait.configs.domains import SomeSpan, Span, Whole
from plait.kernels import GlobalMask, HeadMasks, Mask
from plait.models.layers.cache import Slots
from plait.models.mixers.base import Direction, register
from plait.models.mixers.sparse.masked import MaskedConfig


@register(
    "longformer",
    kind="sparse",
    source="Longformer: The Long-Document Transformer (2004.05150)",
    proof="window, dilated window and global tokens by hand in float64",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LongformerConfig(MaskedConfig):
    """Softmax attention in a window, which some heads dilate, and to and from global tokens: the first of each document.

    Where all of a document is seen, the window reaches as far on both sides, every query sees the global tokens, and these see all.
    Looking back only (the paper's character models), global tokens stay visible outside the window. All tokens share one set of
    projections, as where the paper's second one, for global tokens, starts.
    """

    directions: ClassVar[tuple[Direction, ...]] = ("causal", "bidirectional")

    window_size: Span = 257
    """Visible keys on a side, the query included: 257 on both sides are the published window of 512. A dilated head counts its strides."""
    num_global_tokens: SomeSpan = 1
    """Leading tokens of each document that are global; 1 as for classification."""
    num_dilated_heads: Annotated[int, Whole(0, 4096)] = 0
    """Heads, the last ones, whose window is dilated; 2 in the upper layers of the paper's character models."""
    dilation: Span = 2
    """Distance between the keys that those heads see in their window."""

    @classmethod
    def example(cls) -> LongformerConfig:
        return cls(num_heads=4, head_dim=16, window_size=8, num_global_tokens=2, num_dilated_heads=1)

    def mask(self, num_heads: int, causal: bool) -> Mask | HeadMasks:
        dilated = self.num_dilated_heads
        if dilated > num_heads:
            raise ValueError(f"num_dilated_heads={dilated} must be at most num_heads={num_heads}; use 0 or 2")
        plain, wide = (self._of_head(causal, stride) for stride in (None, self.dilation))
        return HeadMasks((plain,) * (num_heads - dilated) + (wide,) * dilated) if dilated else plain

    def _of_head(self, causal: bool, dilation: int | None) -> Mask:
        size, count = self.window_size, self.num_global_tokens
        if causal or not count:
            return Mask(causal=causal, window_size=size, dilation=dilation, num_sink_tokens=count)
        return GlobalMask(window_size=size, dilation=dilation, num_global_tokens=count)

    def slots(self) -> Slots:
        stride = self.dilation if self.num_dilated_heads else 1
        return Slots((self.window_size - 1) * stride + 1, self.num_global_tokens)
