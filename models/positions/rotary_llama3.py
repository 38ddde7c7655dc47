"""Rotary embedding whose long waves are stretched, as in Llama 3.1."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np

from plait.configs.domains import Length, Number, Positive
from plait.models.positions.base import register
from plait.models.positions.rotary import RotaryConfig


@register("rotary_llama3", source="The Llama 3 Herd of Models (2407.21783)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RotaryConfig(RotaryConfig):
    """Waves of more than `original_len / low_frequency` tokens are stretched by the factor, those below `original_len / high_frequency`
    stay, and between the two rates are mixed."""

    theta: Annotated[float, Number(least=1, most=1e15)] = 500_000.0
    """Base of the frequencies."""
    factor: Annotated[float, Number(least=1, most=2**10)] = 8.0
    """How far the long waves are stretched."""
    original_len: Length = 8192
    """Tokens of the longest document of training."""
    low_frequency: Positive = 1.0
    """Waves in `original_len` tokens up to which a pair is stretched."""
    high_frequency: Positive = 4.0
    """Waves from which it stays."""

    def check(self) -> None:
        if self.low_frequency >= self.high_frequency:
            raise ValueError(
                f"low_frequency={self.low_frequency} must be below high_frequency={self.high_frequency}; use 1 and 4"
            )

    def frequencies(self, dim: int) -> np.ndarray:
        frequency = super().frequencies(dim)
        waves = self.original_len * frequency / (2 * np.pi)
        kept = np.clip((waves - self.low_frequency) / (self.high_frequency - self.low_frequency), 0, 1)
        return frequency * kept + frequency / self.factor * (1 - kept)
