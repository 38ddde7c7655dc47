"""Sums of all numbers so far, modulo a prime: yi = x1 + .. + xi modulo 17."""

from __future__ import annotations

import dataclasses

import numpy as np

from plait.data.tasks.base import TASKS
from plait.data.tasks.sums import SumsTask


@TASKS.register("prefix_sum", source="What Happens During the Loss Plateau? (2506.13688), prefix sum")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixSumTask(SumsTask):
    """Sums of all numbers so far modulo 17: the share of them that is right."""

    def sums(self, numbers: np.ndarray) -> np.ndarray:
        return np.cumsum(numbers, axis=1)
