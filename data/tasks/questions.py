"""The base of tasks whose rows are a question and its answers, one behind the other.

tokens    q1 q2 .. |  a1 a2 ..        (filled up with the question's last token, the separator)
targets    .  .    a1 a2 a3 ..        each answer where the one before it stands, the first at the separator
"""

from __future__ import annotations

import abc
import bisect
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from plait.data.config import DataConfig
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED, GeneratedTask

if TYPE_CHECKING:
    from plait.data.batch import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionTask(GeneratedTask):
    """A question with answers; beside the share of answers that are right, that of rows in which all are, as greedy decoding gives."""

    size: ClassVar[str] = "length"
    """The field that says how long a question is."""

    @abc.abstractmethod
    def num_tokens(self, size: int) -> int:
        """Tokens of a row with a question of this size, up to its last answer, which itself is not among them."""

    @abc.abstractmethod
    def ask(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Questions, integers [R, Q], of which the last token is the separator, and their answers, [R, A]."""

    def fit(self, data: DataConfig) -> None:
        size = getattr(self, self.size)
        needs = self.num_tokens(size)
        if needs > data.seq_len:
            most = bisect.bisect_right(range(1, size), data.seq_len, key=self.num_tokens)
            less = f"{most} or less, or " if most else ""
            raise ValueError(
                f"{self.size}={size} needs rows of at least {needs} tokens, not data.seq_len={data.seq_len}; "
                f"use {less}data.seq_len={needs} or more"
            )

    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        question, answers = self.ask(draws)
        first, stop = question.shape[1], question.shape[1] + answers.shape[1] - 1
        tokens = np.repeat(question[:, -1:], seq_len, axis=1)
        targets = np.full(tokens.shape, NOT_ASKED)
        tokens[:, :first], tokens[:, first:stop] = question, answers[:, :-1]
        targets[:, first - 1 : stop] = answers
        return tokens, targets

    def scores(self, batch: Batch, nll: np.ndarray, right: np.ndarray) -> Mapping[str, tuple[float, float]]:
        asked = batch.loss_mask > 0
        whole = asked.any(1) & (right | ~asked).all(1)
        return {**super().scores(batch, nll, right), "whole": (float(whole.sum()), float(asked.any(1).sum()))}
