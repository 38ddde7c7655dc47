"""Selective copying: data tokens between noise, to be told in their order at the end.

    tokens    . 3 . . 7 . 1 . .  ?  ?  ?      data tokens at any places, noise (.) elsewhere, and as many markers (?)
    targets   . . . . . . . . .  3  7  1      each data token at its marker; nothing elsewhere

Answers are not written into the row.
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

NOISE = 0


@TASKS.register("selective_copy", source="Mamba (2312.00752), section 4.1.1, with the generator of S4's authors")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopyTask(GeneratedTask):
    """Copying what is no noise: the share of data tokens that is told rightly."""

    leaks_to_the_past = False

    vocab_size: Annotated[int, Whole(4, 2**21)] = 16
    """Ids: 0 is noise, the last one the marker, and those between are data."""
    num_data: Annotated[int, Whole(1, 2**20)] = 16
    """Data tokens of a row; the rest, but for as many markers, is noise. Published: 16 in 4096 tokens of noise, rows of 4128."""

    def vocabulary(self, data: DataConfig) -> int:
        return self.vocab_size

    def fit(self, data: DataConfig) -> None:
        if 2 * self.num_data > data.seq_len:
            most = data.seq_len // 2
            less = f"{most} or less, or " if most else ""
            raise ValueError(
                f"num_data={self.num_data} must be at most half of data.seq_len={data.seq_len}, as each has a marker; "
                f"use {less}data.seq_len={2 * self.num_data} or more"
            )

    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        told = 1 + draws.integers(self.vocab_size - 2, self.num_data)
        body = seq_len - self.num_data
        places = np.sort(np.argsort(draws.uniform(body), axis=1)[:, : self.num_data], axis=1)
        tokens, targets = np.full((len(told), seq_len), NOISE), np.full((len(told), seq_len), NOT_ASKED)
        np.put_along_axis(tokens, places, told, axis=1)
        tokens[:, body:], targets[:, body:] = self.vocab_size - 1, told
        return tokens, targets
