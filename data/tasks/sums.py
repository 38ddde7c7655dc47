"""The base of tasks that ask for sums of a row's numbers, modulo a prime.

tokens    x1 x2 x3 .. xn  |   y1 y2 ..  (filled up with the separator)
targets    .  .  .     .  y1  y2 y3 ..
"""

from __future__ import annotations

import abc
import dataclasses

import numpy as np

from plait.configs.domains import Length
from plait.data.config import DataConfig
from plait.data.tasks.draws import Draws
from plait.data.tasks.questions import QuestionTask

MODULUS = SEPARATOR = 17


@dataclasses.dataclass(frozen=True, kw_only=True)
class SumsTask(QuestionTask):
    """A sum for each number."""

    length: Length = 16
    """Numbers of 1 to 16, and sums."""

    @abc.abstractmethod
    def sums(self, numbers: np.ndarray) -> np.ndarray:
        """y [R, n] of x [R, n], before the modulus."""

    def vocabulary(self, data: DataConfig) -> int:
        return MODULUS + 1

    def num_tokens(self, size: int) -> int:
        return 2 * size

    def ask(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        numbers = 1 + draws.integers(MODULUS - 1, self.length)
        return np.pad(numbers, ((0, 0), (0, 1)), constant_values=SEPARATOR), self.sums(numbers) % MODULUS
