"""Common words: which words of a numbered list come more often than the others, as bytes.

    Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.
    1. qwerty 2. asdfgh 3. qwerty 4. yxcvbn ..
    Question: What are the 3 most common words in the above list? Answer: The top 3 words that appear most often in the list are:
    1. qwerty 2. yxcvbn 3. poiuzt

The common words come equally often; the answer has them in the order in which they first come.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from plait.configs.domains import Length
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.word_list import WordListTask


@TASKS.register("common_words", source="RULER (2404.06654), common words extraction")
@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonWordsTask(WordListTask):
    """The common words of a list: the share of bytes told, of words told whole, the same by order, and of rows with all of them."""

    frequency: Length = 4
    """How often each common word comes."""
    other_frequency: Length = 1
    """How often each of the other words comes, of which there are as many as the row holds."""

    def check(self) -> None:
        if self.frequency <= self.other_frequency:
            raise ValueError(
                f"frequency={self.frequency} must be above other_frequency={self.other_frequency}, or no word is common; "
                f"use {self.other_frequency + 1} or more"
            )

    def fit(self, data: DataConfig) -> None:
        if self.counts(data.seq_len) is None:
            least = self._bytes(self.num_answers * self.frequency + self.other_frequency) - self.room(0)
            raise ValueError(
                f"frequency={self.frequency} of num_answers={self.num_answers} words and another need rows of at least {least} tokens, not "
                f"data.seq_len={data.seq_len}; use a smaller one, or data.seq_len={least} or more"
            )

    @property
    def told(self) -> tuple[str, str]:
        number = self.num_answers
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. "
            "Memorize the ones that appear most often.\n",
            f"\nQuestion: What are the {number} most common words in the above list? "
            f"Answer: The top {number} words that appear most often in the list are:",
        )

    def listed(self, words: Sequence[str]) -> str:
        return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))

    def answers(self, words: Sequence[str], listed: Sequence[str]) -> Sequence[str]:
        common = set(words[: self.num_answers])
        return [word for word in dict.fromkeys(listed) if word in common]

    def before(self, place: int) -> str:
        return f" {place + 1}. "

    def counts(self, seq_len: int) -> Sequence[int] | None:
        """None where no other word fits."""
        room, common = self.room(seq_len), self.num_answers * self.frequency
        low, high = 0, max(room, 0)  # the most other words by halving
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._bytes(common + middle * self.other_frequency) <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        return [self.frequency] * self.num_answers + [self.other_frequency] * low if low else None

    def _bytes(self, num_words: int) -> int:
        """Of a list of so many numbered words, parted by blanks."""
        digits = sum(num_words - 10**k + 1 for k in range(int(math.log10(max(num_words, 1))) + 2) if 10**k <= num_words)
        return digits + num_words * (len(". ") + self.word_length + 1) - 1
