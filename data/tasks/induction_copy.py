"""Different tokens twice: the second time each is to be told from the one before it.

tokens    <s> r1 r2 .. rL r1 r2 .. rL   (and <s> again where a row has a token more)
targets    .  .  .      .  r2 r3 ..     nothing elsewhere
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np

from plait.configs.domains import Whole
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED, GeneratedTask

LEAST = 5
"""Tokens of the shortest row: the start, and two different tokens twice."""


@TASKS.register("induction_copy", source="In-context Learning and Induction Heads (2209.11895), repeated random tokens")
@dataclasses.dataclass(frozen=True, kw_only=True)
class InductionCopyTask(GeneratedTask):
    """A sequence of different tokens that comes twice: the share that is right the second time."""

    vocab_size: Annotated[int, Whole(3, 2**21)] = 1024
    """Ids, of which the last is the start of a row; the sequence, as long as fits twice, must not have more tokens than there are others."""

    def vocabulary(self, data: DataConfig) -> int:
        return self.vocab_size

    def fit(self, data: DataConfig) -> None:
        if data.seq_len < LEAST:
            raise ValueError(
                f"vocab_size={self.vocab_size} needs rows that hold two different tokens twice, of {LEAST} tokens or more, not "
                f"data.seq_len={data.seq_len}; use data.seq_len={LEAST} or more"
            )
        length = (data.seq_len - 1) // 2
        if length >= self.vocab_size:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be above the {length} different tokens that fit twice into data.seq_len={data.seq_len}; "
                f"use {length + 1} or more, or data.seq_len={2 * self.vocab_size} or less"
            )

    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        length = (seq_len - 1) // 2
        tokens, targets = (np.full((draws.num_rows, seq_len), value) for value in (self.vocab_size - 1, NOT_ASKED))
        tokens[:, 1 : 2 * length + 1] = np.tile(draws.distinct(self.vocab_size - 1, length), 2)
        targets[:, length + 1 : 2 * length] = tokens[:, length + 2 : 2 * length + 1]
        return tokens, targets
