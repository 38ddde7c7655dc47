"""Sums over a moving window of two, modulo a prime: a task that models learn all at once, after a plateau.

tokens    x1 x2 x3 .. xn  |   y1 y2 ..  (filled up with the separator)
targets    .  .  .     .  y1  y2 y3 ..  y1 = x1, and yi = x(i-1) + xi modulo 17 after it
"""

from __future__ import annotations

import dataclasses

import numpy as np

from plait.configs.domains import Length
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.questions import QuestionTask

MODULUS = SEPARATOR = 17


@TASKS.register("moving_window", source="What Happens During the Loss Plateau? (2506.13688), moving-window sum")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingWindowTask(QuestionTask):
    """Sums of neighbours modulo 17: the share of them that is right."""

    length: Length = 16
    """Numbers of 1 to 16, and sums."""

    def vocabulary(self, data: DataConfig) -> int:
        return MODULUS + 1

    def num_tokens(self, size: int) -> int:
        return 2 * size

    def ask(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        numbers = 1 + draws.integers(MODULUS - 1, self.length)
        sums = numbers.copy()
        sums[:, 1:] = (numbers[:, 1:] + numbers[:, :-1]) % MODULUS
        return np.pad(numbers, ((0, 0), (0, 1)), constant_values=SEPARATOR), sums
