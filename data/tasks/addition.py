"""Addition of two numbers of several digits.

tokens    1 2 0 3 + 0 0 9 8 =  1 0 3 1     (filled up with =)
targets   . . . . . . . . . 1  0 3 1 0     1203 + 98 = 1301 in one digit more, the least significant first
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import numpy as np

from plait.configs.domains import Whole
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.questions import QuestionTask

PLUS, EQUALS = 10, 11


def digits(numbers: np.ndarray, count: int) -> np.ndarray:
    """The last `count` digits of whole numbers, the least significant first, [..., count]."""
    return numbers[..., None] // 10 ** np.arange(count) % 10


@TASKS.register("addition", source="What Happens During the Loss Plateau? (2506.13688), multi-digit addition")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdditionTask(QuestionTask):
    """Sums of two numbers: the share of digits that are right, and that of whole sums."""

    size = "num_digits"

    num_digits: Annotated[int, Whole(1, 15)] = 4
    """Digits of each number, which is any from 1 on, with zeros before it."""
    order: Literal["least", "most"] = "least"
    """Which digit of the sum comes first; published: the least significant. The numbers begin with their most significant digit."""

    def vocabulary(self, data: DataConfig) -> int:
        return EQUALS + 1

    def num_tokens(self, size: int) -> int:
        return 3 * size + 2

    def ask(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        n = self.num_digits
        numbers = 1 + draws.integers(10**n - 1, 2)
        signs = np.broadcast_to([PLUS, EQUALS], numbers.shape)
        question = np.concatenate([digits(numbers, n)[..., ::-1], signs[..., None]], axis=-1).reshape(len(numbers), -1)
        total = digits(numbers.sum(1), n + 1)
        return question, total if self.order == "least" else total[:, ::-1]
