"""Frequent words: which coded words come most often in a list, as bytes.

    Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words.
    ... qwerty ... ... asdfgh ... qwerty ... ..
    Question: .. What are the three most frequently appeared words in the above coded text? Answer: .. are: qwerty, asdfgh, yxcvbn

Of N words the k-th in rank comes N k^-a / zeta(a) times, rounded down; dots take the first rank.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import numpy as np

from plait.configs.domains import Number, Whole
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED, GeneratedTask
from plait.data.tasks.haystack import BETWEEN, BYTES, codes

if TYPE_CHECKING:
    from plait.data.batch import Batch

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DOTS = "..."


@TASKS.register("frequent_words", source="RULER (2404.06654), frequent words extraction")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequentWordsTask(GeneratedTask):
    """The most frequent words of a list: the share of bytes told, of words told whole, the same by rank, and of rows with all of them."""

    reads_bytes = True

    num_answers: Annotated[int, Whole(1, len(_NUMBERS))] = 3
    """Words asked for, the most frequent first."""
    alpha: Annotated[float, Number(above=1, least=1.1, most=8)] = 2.0
    """Exponent a of the law of ranks."""
    word_length: Annotated[int, Whole(4, 12)] = 6
    """Letters of a word."""

    def vocabulary(self, data: DataConfig) -> int:
        return BYTES

    def fit(self, data: DataConfig) -> None:
        if self._counts(data.seq_len) is None:
            least = next((length for e in range(6, 21) if self._counts(length := 2**e) is not None), None)
            use = "fewer, or a smaller alpha" if least is None else f"fewer, or data.seq_len={least}"
            raise ValueError(
                f"num_answers={self.num_answers} words cannot be told apart by how often they come in rows of "
                f"data.seq_len={data.seq_len}; use {use}"
            )

    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        counts = self._counts(seq_len)
        assert counts is not None  # or `fit` would have refused the rows
        size, asked = self.word_length, self.num_answers
        words = codes(draws.distinct(26**size, len(counts) - 1), size)
        order = np.argsort(draws.uniform(sum(counts)), axis=1)
        ranks = np.repeat(np.arange(len(counts)), counts)[order]
        tokens, targets = np.zeros((draws.num_rows, seq_len), np.int64), np.full((draws.num_rows, seq_len), NOT_ASKED)
        opening, question = self._said()
        for row, (mine, places) in enumerate(zip(words, ranks)):
            ranked = [_DOTS, *mine]
            head = opening + " ".join(ranked[rank] for rank in places) + question
            whole = np.frombuffer((head + BETWEEN.join(mine[:asked])).encode(), np.uint8)
            tokens[row, : len(whole) - 1] = whole[:-1]
            at = (len(head) + (size + len(BETWEEN)) * np.arange(asked)[:, None] + np.arange(size)).ravel()
            targets[row, at - 1] = whole[at]
        return tokens, targets

    def scores(self, batch: Batch, nll: np.ndarray, right: np.ndarray) -> Mapping[str, tuple[float, float]]:
        rows = batch.loss_mask.any(1)
        found = right[rows][batch.loss_mask[rows] > 0].reshape(-1, self.num_answers, self.word_length).all(-1)
        return {
            **super().scores(batch, nll, right),
            "found": (float(found.sum()), float(found.size)),
            "all_found": (float(found.all(1).sum()), float(len(found))),
            **{f"found_{k + 1}": (float(found[:, k].sum()), float(len(found))) for k in range(self.num_answers)},
        }

    def _said(self) -> tuple[str, str]:
        """What stands before and behind the list."""
        number = _NUMBERS[self.num_answers - 1]
        return (
            "Read the following coded text and track the frequency of each coded word. "
            f"Find the {number} most frequently appeared coded words. ",
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
            f"What are the {number} most frequently appeared words in the above coded text? "
            f"Answer: According to the coded text above, the {number} most frequently appeared words are: ",
        )

    def _counts(self, seq_len: int) -> list[int] | None:
        """How often dots and each word come in the longest list that the rows hold; None where words asked for come as often as others."""
        size, asked = self.word_length, self.num_answers
        room = seq_len + 1 - sum(map(len, self._said())) - asked * size - (asked - 1) * len(BETWEEN)
        low, high = 0, max(room, 0)  # the longest list of N words by halving
        while low < high:
            middle = (low + high + 1) // 2
            counts = self._of(middle)
            low, high = (middle, high) if _bytes(counts, size) <= room else (low, middle - 1)
        counts = [*self._of(low), 0]
        told = counts[1 : asked + 2]
        return counts[:-1] if len(told) == asked + 1 and all(one > two for one, two in itertools.pairwise(told)) else None

    def _of(self, num_words: int) -> list[int]:
        """The counts of all ranks that come at least once."""
        share = num_words / _zeta(self.alpha)
        return [int(share * k**-self.alpha) for k in range(1, int(share ** (1 / self.alpha)) + 2) if share * k**-self.alpha >= 1]


def _bytes(counts: list[int], size: int) -> int:
    """Of the list, its words parted by blanks."""
    return max(0, sum(counts[:1]) * len(_DOTS + " ") + sum(counts[1:]) * (size + 1) - 1)


def _zeta(a: float) -> float:
    """Riemann's zeta function above 1: a sum and what Euler and Maclaurin say is left of it."""
    n = 1000
    return math.fsum(k**-a for k in range(1, n)) + n ** (1 - a) / (a - 1) + n**-a / 2 + a * n ** (-a - 1) / 12
