"""Rotary embedding of positions that are pressed together."""

from __future__ import annotations

import dataclasses

import numpy as np

from plait.configs.domains import Factor
from plait.models.positions.base import register
from plait.models.positions.rotary import RotaryConfig


@register("rotary_linear", source="Extending Context Window of Large Language Models via Positional Interpolation (2306.15595)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRotaryConfig(RotaryConfig):
    """Rotary embedding of `position / factor`."""

    factor: Factor = 4.0
    """Longest document over the one of training."""

    def frequencies(self, dim: int) -> np.ndarray:
        return super().frequencies(dim) / self.factor
