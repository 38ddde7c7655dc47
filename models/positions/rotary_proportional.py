"""Rotary embedding that leaves its slowest pairs as they are."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np

from plait.configs.domains import Number
from plait.models.positions.base import register
from plait.models.positions.rotary import RotaryConfig


@register("rotary_proportional", source="Round and Round We Go! What makes Rotary Positional Encodings useful? (2410.06205)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProportionalRotaryConfig(RotaryConfig):
    """p-RoPE: of the pairs of a whole head of K channels, whose angles are `position theta^(-2i / K)`, the first `fraction` are turned.

    `rotary` turns the same share of a head by frequencies that go all the way down, and pairs channels within that share.
    """

    fraction: Annotated[float, Number(above=0, least=2**-10, most=1)] = 0.25
    """Share of a head's channels that is turned, those of the fastest pairs."""

    def turned(self, head_dim: int) -> int:
        return head_dim

    def frequencies(self, dim: int) -> np.ndarray:
        found = super().frequencies(dim)
        return np.where(np.arange(len(found)) < int(self.fraction * dim) // 2, found, 0.0)
