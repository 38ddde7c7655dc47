"""The base of tasks that ask which words of a list come most often.

    tokens    opening .. word word word .. \\n question  word, word
    targets    .                                    word  word

Tokens are bytes. Each byte of a word that is asked for is asked for where the one before it stands; what parts the answers is given.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np

from plait.configs.domains import Whole
from plait.data.config import DataConfig
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED, GeneratedTask
from plait.data.tasks.haystack import BYTES, codes

if TYPE_CHECKING:
    from plait.data.batch import Batch

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordListTask(GeneratedTask):
    """The words of a list that come most often: the share of bytes told, of words told whole, the same by place, and of rows with all."""

    reads_bytes = True
    fillers: ClassVar[tuple[str, ...]] = ()
    """What stands in the list beside words, in the first ranks."""

    num_answers: Annotated[int, Whole(1, len(NUMBERS))] = 3
    """Words asked for."""
    word_length: Annotated[int, Whole(4, 12)] = 6
    """Letters of a word."""

    @property
    @abc.abstractmethod
    def told(self) -> tuple[str, str]:
        """What stands before and behind the list."""

    @abc.abstractmethod
    def counts(self, seq_len: int) -> Sequence[int] | None:
        """How often each rank comes in the longest list that the rows hold, the most frequent first; None where none fits."""

    @abc.abstractmethod
    def listed(self, words: Sequence[str]) -> str:
        """The list."""

    @abc.abstractmethod
    def answers(self, words: Sequence[str], listed: Sequence[str]) -> Sequence[str]:
        """Of a row's words by rank and the list: those asked for, in the order of the answer."""

    @abc.abstractmethod
    def before(self, place: int) -> str:
        """What stands before the answer of this place, from 0 on."""

    def vocabulary(self, data: DataConfig) -> int:
        return BYTES

    def room(self, seq_len: int) -> int:
        """Bytes of the longest list that the rows hold; negative where they do not hold the question."""
        said = sum(map(len, self.told)) + sum(len(self.before(place)) for place in range(self.num_answers))
        return seq_len + 1 - said - self.num_answers * self.word_length

    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        counts = self.counts(seq_len)
        assert counts is not None  # or `fit` would have refused the rows
        size = self.word_length
        words = codes(draws.distinct(26**size, len(counts) - len(self.fillers)), size)
        order = np.argsort(draws.uniform(sum(counts)), axis=1)
        ranks = np.repeat(np.arange(len(counts)), counts)[order]
        tokens, targets = np.zeros((draws.num_rows, seq_len), np.int64), np.full((draws.num_rows, seq_len), NOT_ASKED)
        opening, question = self.told
        for row, (mine, places) in enumerate(zip(words, ranks)):
            ranked = [*self.fillers, *mine]
            listed = [ranked[rank] for rank in places]
            text = opening + self.listed(listed) + question
            for place, answer in enumerate(self.answers(mine, listed)):
                text += self.before(place)
                targets[row, len(text) - 1 : len(text) - 1 + size] = np.frombuffer(answer.encode(), np.uint8)
                text += answer
            tokens[row, : len(text) - 1] = np.frombuffer(text[:-1].encode(), np.uint8)
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
