"""The mask of attention in a window, with tokens that see and are seen by all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from plait.kernels.masks.mask import FAR, Mask, Span

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class GlobalMask(Mask):
    """A window on both sides, dilated or not, and the segment's first tokens, which every query sees and which see every key.

    Looking back only, the first tokens are sink tokens: `Mask` has those.

    Source: Longformer, arXiv 2004.05150, section 3.1.
    """

    causal: bool = False
    """Always False."""

    num_global_tokens: int = 1
    """The first tokens of each segment, which see all and are seen by all."""

    def __post_init__(self) -> None:
        if self.causal or self.num_sink_tokens:
            raise ValueError("GlobalMask sees both ways: leave causal=False and num_sink_tokens=0, or use Mask with sink tokens")
        if self.num_global_tokens < 1:
            raise ValueError(f"mask.num_global_tokens={self.num_global_tokens} must be at least 1; use Mask for none")
        super().__post_init__()

    @property
    def alignment(self) -> int:
        """See `Mask.alignment`: the rule knows the first tokens from all others."""
        return FAR

    def reaches(self, q_positions: Array, kv_positions: Array) -> Array:
        """See `Mask.reaches`."""
        first = (q_positions < self.num_global_tokens) | (kv_positions < self.num_global_tokens)
        return first | super().reaches(q_positions, kv_positions)

    def tile(self, q: Span, k: Span) -> tuple[Any, Any]:
        """See `Mask.tile`."""
        some, every = super().tile(q, k)
        some = some | (q.low < self.num_global_tokens) | (k.low < self.num_global_tokens)
        return some, every | (q.high < self.num_global_tokens) | (k.high < self.num_global_tokens)

    def reach_back(self) -> int | None:
        """See `Mask.reach_back`."""
        return None

    def key_range(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        """See `Mask.key_range`."""
        return 0, num_keys
