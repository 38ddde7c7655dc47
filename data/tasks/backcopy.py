"""Bigram-Backcopy: a Markov chain in which, after some symbols, the symbol before them comes again.

    tokens    <s>  c   a   f   T   f   b   T   b  ..       T, one of the k most frequent symbols, is a trigger
    targets    c   a   f   T   f   b   T   b   .. ..       after a trigger the symbol before it, else one that the chain draws

A head that copies for triggers has nothing to do elsewhere, and attends to `<s>` there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated

import numpy as np

from plait.configs.domains import Length, Whole
from plait.data.batch import Batch
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import GeneratedTask


@TASKS.register(
    "backcopy", source="Active-Dormant Attention Heads (2410.13835), section 2; the chain is drawn, not counted in a text"
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class BackcopyTask(GeneratedTask):
    """Bigram-Backcopy: accuracy and loss of what is copied, and the loss of what the chain draws."""

    num_symbols: Annotated[int, Whole(8, 4096)] = 64
    """Symbols, ids 1, 2, ..., the most frequent first; 0 is the start `<s>` of each row."""
    num_triggers: Length = 3
    """Triggers k: ids 1 .. k."""

    num_sequences: Length = 1
    """Sequences packed in a row, each a document of its own with `data.seq_len` / `num_sequences` tokens."""

    def check(self) -> None:
        if self.num_triggers >= self.num_symbols:
            raise ValueError(
                f"num_triggers={self.num_triggers} must be below num_symbols={self.num_symbols}; use {self.num_symbols - 1} or less"
            )

    def fit(self, data: DataConfig) -> None:
        if data.seq_len % self.num_sequences:
            raise ValueError(
                f"num_sequences={self.num_sequences} must divide data.seq_len={data.seq_len}; "
                f"use data.seq_len={-(-data.seq_len // self.num_sequences) * self.num_sequences}"
            )

    @property
    def documents(self) -> int:
        return self.num_sequences

    def vocabulary(self, data: DataConfig) -> int:
        return self.num_symbols + 1

    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        first, following = chain(self.num_symbols, self.num_triggers)
        chance = draws.uniform(seq_len)
        row = np.zeros((draws.num_rows, seq_len + 1), np.int64)
        row[:, 1] = 1 + np.searchsorted(first, chance[:, 0], side="right")
        for t in range(1, seq_len):
            last = row[:, t]
            drawn = 1 + (chance[:, t, None] >= following[last - 1]).sum(1)
            row[:, t + 1] = np.where(last <= self.num_triggers, row[:, t - 1], drawn)
        return row[:, :-1], row[:, 1:]

    def scores(self, batch: Batch, nll: np.ndarray, right: np.ndarray) -> Mapping[str, tuple[float, float]]:
        copied = batch.loss_mask * ((batch.tokens > 0) & (batch.tokens <= self.num_triggers))
        drawn = batch.loss_mask * (batch.tokens > self.num_triggers)  # the first symbol is not the chain's
        return {
            "copy_accuracy": (float((right * copied).sum()), float(copied.sum())),
            "copy_loss": (float((nll * copied).sum()), float(copied.sum())),
            "chain_loss": (float((nll * drawn).sum()), float(drawn.sum())),
        }


@functools.lru_cache(maxsize=4)
def chain(num_symbols: int, num_triggers: int) -> tuple[np.ndarray, np.ndarray]:
    """Cumulative chances of the first symbol, [V], which is no trigger, and of the one that follows each, [V, V].

    Symbols are as frequent as their rank says (Zipf); how much more likely one is after another is drawn, alike in every run.
    """
    frequency = 1 / np.arange(1, num_symbols + 1)
    liking = np.square(np.log1p(-Draws(np.arange(num_symbols), "backcopy").uniform(num_symbols)))
    return _cumulative(frequency * (np.arange(num_symbols) >= num_triggers)), _cumulative(frequency * liking)


def _cumulative(weights: np.ndarray) -> np.ndarray:
    total = np.cumsum(weights, axis=-1)
    return total / total[..., -1:]
