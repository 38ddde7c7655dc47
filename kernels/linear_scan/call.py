"""The call of the channelwise scan, and what a segment makes of decays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from plait.kernels import chunking
from plait.kernels.call import OPTION, Call, letters
from plait.kernels.shapes import accumulation_dtype

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LinearScanCall(Call):
    """One call of `plait.kernels.linear_scan`."""

    results: ClassVar[tuple[str, ...]] = ("bth", "bh")

    x: Array = field(metadata=letters("bth"))
    g: Array = field(metadata=letters("bth"))
    initial_state: Any = field(metadata=letters("bh"))
    segment_ids: Any = field(metadata=letters("bt"))
    chunk_size: int = field(metadata=OPTION)

    @property
    def start(self) -> Array:
        """The state [B, C] before the first token."""
        x = self.x
        zeros = jnp.zeros((x.shape[0], x.shape[2]), accumulation_dtype(x))
        return zeros if self.initial_state is None else self.initial_state.astype(zeros.dtype)

    @property
    def log_decay(self) -> Array:
        """What a sequence of one segment does to the state that enters it, [B, C]: the sum of g over tokens that are no padding."""
        g = self.g.astype(accumulation_dtype(self.x))
        real, _ = real_and_starts(self.segment_ids)
        return (g if real is None else jnp.where(real[..., None], g, 0)).sum(1)


def real_and_starts(segment_ids: Array | None) -> tuple[Array | None, Array | None]:
    """Which tokens are no padding, and which begin a segment after another, bool [B, T]; None each where there is one segment."""
    if segment_ids is None:
        return None, None
    index, real = chunking.segment_index(segment_ids)
    return real, jnp.diff(index, axis=1, prepend=0) != 0
