"""How often each symbol of a string is in it.

tokens    c  a  b  a  |  1  2 ..   (filled up with the separator)
targets   .  .  .  .  1  2  1  2   for each symbol of the string its count
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np

from plait.configs.domains import Whole
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.questions import QuestionTask


@TASKS.register("histogram", source="What Happens During the Loss Plateau? (2506.13688), histogram")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HistogramTask(QuestionTask):
    """Counts of the symbols of a string: the share of them that is right."""

    num_symbols: Annotated[int, Whole(2, 4096)] = 12
    """Symbols, ids 1, 2, ...; 0 is the separator, and a count is the id of its number."""
    length: Annotated[int, Whole(1, 4096)] = 16
    """Symbols of the string, and counts."""

    def vocabulary(self, data: DataConfig) -> int:
        return max(self.num_symbols, self.length) + 1

    def num_tokens(self, size: int) -> int:
        return 2 * size

    def ask(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        string = 1 + draws.integers(self.num_symbols, self.length)
        row = np.arange(len(string))[:, None]
        counts = np.zeros((len(string), self.num_symbols + 1), np.int64)
        np.add.at(counts, (row, string), 1)
        return np.pad(string, ((0, 0), (0, 1))), counts[row, string]
