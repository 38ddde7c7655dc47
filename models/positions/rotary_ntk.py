"""Rotary embedding whose base is raised for longer documents."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np

from plait.configs.domains import Number
from plait.models.positions.base import register
from plait.models.positions.rope import frequencies
from plait.models.positions.rotary import RotaryConfig


@register("rotary_ntk", source="NTK-aware scaled RoPE, section 3.1 of YaRN (2309.00071)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NTKRotaryConfig(RotaryConfig):
    """Rotary embedding with base `theta factor^(R / (R - 2))`: the slowest pair as if positions were divided, the fastest as before.

    The factor is fixed. Its dynamic form takes it from the length read so far, and a cache of turned keys cannot follow that. NTK by
    parts is `rotary_yarn` with `attention_factor=1`.
    """

    factor: Annotated[float, Number(least=1, most=2**10)] = 4.0
    """Longest document over the one of training."""

    def fit(self, head_dim: int) -> None:
        super().fit(head_dim)
        if (turned := self.fraction * head_dim) < 4:
            raise ValueError(f"fraction={self.fraction} turns {turned:g} channels, and two pairs are needed; use more, or rotary")

    def frequencies(self, dim: int) -> np.ndarray:
        return frequencies(dim, self.theta * self.factor ** (dim / (dim - 2)))
