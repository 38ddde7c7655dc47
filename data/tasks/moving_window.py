"""Sums over a moving window of two, modulo a prime: y1 = x1, and yi = x(i-1) + xi modulo 17 after it.

Models learn it all at once, after a plateau.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from plait.data.tasks.base import TASKS
from plait.data.tasks.sums import SumsTask


@TASKS.register("moving_window", source="What Happens During the Loss Plateau? (2506.13688), moving-window sum")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingWindowTask(SumsTask):
    """Sums of neighbours modulo 17: the share of them that is right."""

    def sums(self, numbers: np.ndarray) -> np.ndarray:
        return np.concatenate([numbers[:, :1], numbers[:, 1:] + numbers[:, :-1]], axis=1)
