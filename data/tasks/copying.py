"""Copying: a string, a separator, and the string again.

tokens    x1 x2 .. xn  |  x1 x2 .. xn  (filled up with the separator)
targets    .  .     .  x1 x2 x3 ..  .
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np

from plait.configs.domains import Length, Whole
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED, GeneratedTask


@TASKS.register("copying", source="Repeat After Me (2402.01032), section 3")
@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyingTask(GeneratedTask):
    """Repeating a string of random symbols: the share of its symbols that is repeated rightly."""

    num_symbols: Annotated[int, Whole(2, 2**20)] = 26
    """Symbols, ids 1, 2, ...; 0 is the separator."""
    length: Length | None = None
    """Symbols of the string; None fills the row."""

    def vocabulary(self, data: DataConfig) -> int:
        return self.num_symbols + 1

    def fit(self, data: DataConfig) -> None:
        most = data.seq_len // 2
        if most < 1:
            raise ValueError(
                f"length={self.length} needs data.seq_len={data.seq_len} to be at least 2; use data.seq_len=2 or more"
            )
        if self.length is not None and self.length > most:
            raise ValueError(
                f"length={self.length} must be at most half of data.seq_len={data.seq_len}; "
                f"use {most} or less, or data.seq_len={2 * self.length} or more"
            )

    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        n = self.length or seq_len // 2
        string = 1 + draws.integers(self.num_symbols, n)
        tokens, targets = np.zeros((draws.num_rows, seq_len), np.int64), np.full((draws.num_rows, seq_len), NOT_ASKED)
        tokens[:, :n], tokens[:, n + 1 : 2 * n + 1] = string, string[:, : seq_len - n - 1]
        targets[:, n : 2 * n] = string
        return tokens, targets
