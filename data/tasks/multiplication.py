"""Long multiplication, digits least significant first: the product at once, or behind the steps of the written method.

    tokens    9 1 7 3 * 9 4 3 3 =  1 3 9 4 5 4 2     (filled up with =)
    targets   . . . . . . . . . 1  3 9 4 5 4 2 1     3719 x 3349 = 12454931

    written   9 1 7 3 * 9 4 3 3 = 1 7 4 3 3 + 0 6 7 8 4 1 ( 1 3 2 2 8 1 ) + 0 0 7 5 1 1 1 ( 1 3 9 7 9 2 1 ) + 0 0 0 7 5 1 1 1 # 1 3 9 4 5 4 2 1

The steps are the product with each digit of the second number, shifted, and in brackets their running sum, but for the first and the
last. Digit k of a product needs the running sum of all digit products of the places up to k with what is carried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np

from plait.configs.domains import Whole
from plait.data.config import DataConfig
from plait.data.tasks.addition import digits
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.questions import QuestionTask

if TYPE_CHECKING:
    from plait.data.batch import Batch

TIMES, EQUALS, PLUS, OPEN, CLOSE, RESULT = range(10, 16)


@TASKS.register(
    "multiplication",
    source="Why Can't Transformers Learn Multiplication? (2510.00184); steps of From Explicit CoT to Implicit CoT (2405.14838)",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiplicationTask(QuestionTask):
    """Products of two numbers: the share of tokens that are right, of each digit of the product, and of rows that are right as a whole."""

    size = "num_digits"

    num_digits: Annotated[int, Whole(1, 9)] = 4
    """Digits of each number, the first of which is not 0."""
    steps: Literal["none", "written"] = "none"
    """Whether the partial products and their running sums are to be written before the product."""

    def vocabulary(self, data: DataConfig) -> int:
        return RESULT + 1

    def num_tokens(self, size: int) -> int:
        first, second = np.full((2, 1), 10 ** (size - 1))
        return 2 * size + 1 + self._answers(first, second, size).shape[1]

    def ask(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        n, least = self.num_digits, 10 ** (self.num_digits - 1)
        numbers = least + draws.integers(9 * least, 2)
        signs = np.broadcast_to([TIMES, EQUALS], numbers.shape)
        question = np.concatenate([digits(numbers, n), signs[..., None]], axis=-1).reshape(len(numbers), -1)
        return question, self._answers(numbers[:, 0], numbers[:, 1], n)

    def _answers(self, first: np.ndarray, second: np.ndarray, n: int) -> np.ndarray:
        """What follows `=`, [R, A]."""
        product = digits(first * second, 2 * n)
        if self.steps == "none":
            return product
        sign = lambda one: np.full((len(first), 1), one)
        partial = first[:, None] * digits(second, n) * 10 ** np.arange(n)
        sums, parts = np.cumsum(partial, axis=1), list[np.ndarray]()
        for i in range(n):
            parts += [sign(PLUS)] if i else []
            parts.append(digits(partial[:, i], n + 1 + i))
            if 0 < i < n - 1:
                parts += [sign(OPEN), digits(sums[:, i], n + 1 + i), sign(CLOSE)]
        return np.concatenate([*parts, sign(RESULT), product], axis=1)

    def scores(self, batch: Batch, nll: np.ndarray, right: np.ndarray) -> Mapping[str, tuple[float, float]]:
        n, rows = 2 * self.num_digits, batch.loss_mask.any(1)
        last = batch.loss_mask.shape[1] - batch.loss_mask[:, ::-1].argmax(1)  # one past the last answer
        found = np.take_along_axis(right, np.maximum(last[:, None] - n + np.arange(n), 0), axis=1)[rows].sum(0)
        each = {f"digit_{k}": (float(found[k]), float(rows.sum())) for k in range(n)}
        return {**super().scores(batch, nll, right), **each}
