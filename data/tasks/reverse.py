"""Reversing: a string, a separator, and the string from its end on.

tokens    x1 x2 .. xn  |  xn ..     (filled up with the separator)
targets    .  .     .  xn x(n-1) .. x1
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np

from plait.configs.domains import Length, Whole
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.questions import QuestionTask


@TASKS.register("reverse", source="What Happens During the Loss Plateau? (2506.13688), reverse")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseTask(QuestionTask):
    """A string of random symbols backwards: the share of its symbols that is right."""

    num_symbols: Annotated[int, Whole(2, 2**20)] = 16
    """Symbols, ids 1, 2, ...; 0 is the separator."""
    length: Length = 16
    """Symbols of the string."""

    def vocabulary(self, data: DataConfig) -> int:
        return self.num_symbols + 1

    def num_tokens(self, size: int) -> int:
        return 2 * size

    def ask(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        string = 1 + draws.integers(self.num_symbols, self.length)
        return np.pad(string, ((0, 0), (0, 1))), string[:, ::-1]
