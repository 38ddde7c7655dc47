"""A string, a permutation of its places, and the string in that order.

tokens    x1 x2 x3  |  p1 p2 p3  |  ..          (filled up with the separator)
targets    .  .  .  .   .  .  .  x(p1) x(p2) x(p3)
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


@TASKS.register("permutation", source="What Happens During the Loss Plateau? (2506.13688), permutation")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PermutationTask(QuestionTask):
    """A string put in the order that a permutation names: the share of its symbols that is right."""

    num_symbols: Annotated[int, Whole(2, 2**20)] = 16
    """Symbols, whose ids follow those of the places 1 to `length`; 0 is the separator."""
    length: Annotated[int, Whole(1, 2**20)] = 16
    """Symbols of the string."""
    power: Annotated[int, Whole(1, 4)] = 1
    """How often the permutation is applied; published: 1 to 4."""

    def vocabulary(self, data: DataConfig) -> int:
        return 1 + self.length + self.num_symbols

    def num_tokens(self, size: int) -> int:
        return 3 * size + 1

    def ask(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        string = 1 + self.length + draws.integers(self.num_symbols, self.length)
        order = np.argsort(draws.uniform(self.length), axis=1)
        places = order
        for _ in range(self.power - 1):
            places = np.take_along_axis(places, order, axis=1)
        separator = np.zeros((len(string), 1), np.int64)
        question = np.concatenate([string, separator, 1 + order, separator], axis=1)
        return question, np.take_along_axis(string, places, axis=1)
