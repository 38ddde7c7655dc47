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
from plait.data.tasks.generated import NOT_ASKED, GeneratedTask

MODULUS = SEPARATOR = 17


@TASKS.register("moving_window", source="What Happens During the Loss Plateau? (2506.13688), moving-window sum")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingWindowTask(GeneratedTask):
    """Sums of neighbours modulo 17: the share of them that is right."""

    length: Length = 16
    """Numbers of 1 to 16, and sums."""

    def vocabulary(self, data: DataConfig) -> int:
        return MODULUS + 1

    def fit(self, data: DataConfig) -> None:
        if 2 * self.length > data.seq_len:
            most = data.seq_len // 2
            less = f"{most} or less, or " if most else ""
            raise ValueError(
                f"length={self.length} must be at most half of data.seq_len={data.seq_len}; "
                f"use {less}data.seq_len={2 * self.length} or more"
            )

    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        n = self.length
        numbers = 1 + draws.integers(MODULUS - 1, n)
        sums = numbers.copy()
        sums[:, 1:] = (numbers[:, 1:] + numbers[:, :-1]) % MODULUS
        shape = (draws.num_rows, seq_len)
        tokens, targets = np.full(shape, SEPARATOR), np.full(shape, NOT_ASKED)
        tokens[:, :n], tokens[:, n + 1 : 2 * n] = numbers, sums[:, :-1]
        targets[:, n : 2 * n] = sums
        return tokens, targets
