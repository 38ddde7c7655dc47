"""Rotary embedding whose slow pairs are pressed together, and attention sharpened."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import numpy as np

from plait.configs.domains import Length, Number, Positive
from plait.models.positions.base import register
from plait.models.positions.rotary import RotaryConfig


@register("rotary_yarn", source="YaRN: Efficient Context Window Extension of Large Language Models (2309.00071)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRotaryConfig(RotaryConfig):
    """Pairs that turn less than `beta_slow` times in `original_len` tokens are divided by the factor, those that turn more than
    `beta_fast` times stay, with a ramp between; queries and keys are multiplied by `0.1 mscale ln(factor) + 1` each.

    MLA multiplies its logits by the square of that number instead, as in DeepSeek.
    """

    factor: Annotated[float, Number(least=1, most=2**10)] = 4.0
    """Longest document over the one of training."""
    original_len: Length = 4096
    """Tokens of the longest document of training."""
    beta_fast: Positive = 32.0
    """Turns from which a pair stays as it is."""
    beta_slow: Positive = 1.0
    """Turns up to which a pair is divided."""
    truncate: bool = True
    """The ramp begins and ends at whole pairs (GPT-OSS: False)."""
    mscale: Annotated[float, Number(least=0, most=100)] = 1.0
    """How fast attention sharpens with the factor."""
    attention_factor: Positive | None = None
    """What turned queries and keys are multiplied by; None gives `0.1 mscale ln(factor) + 1`, and 1 is NTK by parts."""

    def check(self) -> None:
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow={self.beta_slow} must be below beta_fast={self.beta_fast}; use 1 and 32")
        if self.theta <= 1:
            raise ValueError(f"theta={self.theta} must be above 1, or all pairs turn alike; use 10000")

    @property
    def magnitude(self) -> float:
        return 0.1 * self.mscale * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def frequencies(self, dim: int) -> np.ndarray:
        frequency = super().frequencies(dim)
        pair = lambda turns: dim * math.log(self.original_len / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        return frequency * (1 - ramp) + frequency / self.factor * ramp
