"""One number over and over, or with 1 added from block to block: what models do on the plateau of other tasks is the answer here.

tokens    x1 x2 .. xn  |  x1 x1 .. x1+1 x1+1 ..  (filled up with the separator)
targets    .  .     .  x1 x1 .. x1+1  .. x1+k-1  in k blocks of n/k answers, modulo 17
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np

from plait.configs.domains import Length, Whole, choices, divisors
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.questions import QuestionTask

MODULUS = SEPARATOR = 17


@TASKS.register("repeat", source="What Happens During the Loss Plateau? (2506.13688), repeat 1, 2 and 4")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RepeatTask(QuestionTask):
    """The first number of a row again and again: the share of answers that are right."""

    length: Length = 16
    """Numbers of 1 to 16, and answers."""
    num_blocks: Annotated[int, Whole(1, 2**24)] = 1
    """Blocks k of answers, each one more than the one before it, modulo 17; published: 1, 2 and 4."""

    def check(self) -> None:
        if self.length % self.num_blocks:
            raise ValueError(
                f"num_blocks={self.num_blocks} must divide length={self.length}; use one of {choices(divisors(self.length))}"
            )

    def vocabulary(self, data: DataConfig) -> int:
        return MODULUS + 1

    def num_tokens(self, size: int) -> int:
        return 2 * size

    def ask(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        numbers = 1 + draws.integers(MODULUS - 1, self.length)
        blocks = np.arange(self.length) // (self.length // self.num_blocks)
        return np.pad(numbers, ((0, 0), (0, 1)), constant_values=SEPARATOR), (numbers[:, :1] + blocks) % MODULUS
