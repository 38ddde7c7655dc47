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
from collections.abc import Sequence
from typing import Annotated

from plait.configs.domains import Number
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.haystack import BETWEEN
from plait.data.tasks.word_list import NUMBERS, WordListTask

_DOTS = "..."


@TASKS.register("frequent_words", source="RULER (2404.06654), frequent words extraction")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequentWordsTask(WordListTask):
    """The most frequent words of a list: the share of bytes told, of words told whole, the same by rank, and of rows with all of them."""

    fillers = (_DOTS,)

    alpha: Annotated[float, Number(above=1, least=1.1, most=8)] = 2.0
    """Exponent a of the law of ranks."""

    def fit(self, data: DataConfig) -> None:
        if self.counts(data.seq_len) is None:
            least = next((length for e in range(6, 21) if self.counts(length := 2**e) is not None), None)
            use = "fewer, or a smaller alpha" if least is None else f"fewer, or data.seq_len={least}"
            raise ValueError(
                f"num_answers={self.num_answers} words cannot be told apart by how often they come in rows of "
                f"data.seq_len={data.seq_len}; use {use}"
            )

    @property
    def told(self) -> tuple[str, str]:
        number = NUMBERS[self.num_answers - 1]
        return (
            "Read the following coded text and track the frequency of each coded word. "
            f"Find the {number} most frequently appeared coded words. ",
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
            f"What are the {number} most frequently appeared words in the above coded text? "
            f"Answer: According to the coded text above, the {number} most frequently appeared words are: ",
        )

    def listed(self, words: Sequence[str]) -> str:
        return " ".join(words)

    def answers(self, words: Sequence[str], listed: Sequence[str]) -> Sequence[str]:
        return words[: self.num_answers]

    def before(self, place: int) -> str:
        return BETWEEN if place else ""

    def counts(self, seq_len: int) -> Sequence[int] | None:
        """None also where words asked for come as often as others."""
        room = self.room(seq_len)
        low, high = 0, max(room, 0)  # the longest list of N words by halving
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._bytes(self._of(middle)) <= room else (low, middle - 1)
        counts = [*self._of(low), 0]
        told = counts[1 : self.num_answers + 2]
        apart = len(told) == self.num_answers + 1 and all(one > two for one, two in itertools.pairwise(told))
        return counts[:-1] if apart else None

    def _of(self, num_words: int) -> list[int]:
        """The counts of all ranks that come at least once."""
        share = num_words / _zeta(self.alpha)
        return [int(share * k**-self.alpha) for k in range(1, int(share ** (1 / self.alpha)) + 2) if share * k**-self.alpha >= 1]

    def _bytes(self, counts: Sequence[int]) -> int:
        """Of the list, its words parted by blanks."""
        return max(0, sum(counts[:1]) * len(_DOTS + " ") + sum(counts[1:]) * (self.word_length + 1) - 1)


def _zeta(a: float) -> float:
    """Riemann's zeta function above 1: a sum and what Euler and Maclaurin say is left of it."""
    n = 1000
    return math.fsum(k**-a for k in range(1, n)) + n ** (1 - a) / (a - 1) + n**-a / 2 + a * n ** (-a - 1) / 12
