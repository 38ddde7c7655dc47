"""Flip-flop language modelling: a bit is written, kept through what is to be ignored, and read.

tokens    w 1  i 0  i 1  r 1  w 0  r 0      pairs of an instruction and a bit
targets   . .  . .  . .  1 .  . .  0 .      the bit written last, where `r` is read; nothing elsewhere
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from plait.configs.domains import Share
from plait.data.batch import Batch
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED, GeneratedTask

WRITE, READ, IGNORE, ZERO = range(4)


@TASKS.register("flip_flop", source="Exposing Attention Glitches with Flip-Flop Language Modeling (2306.00946)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlipFlopTask(GeneratedTask):
    """Reading the bit that was written last: the share of reads that are right, and that of glitches."""

    ignore: Share = 0.8
    """Share of instructions to ignore; of the others half write and half read. The published test sets have 0.98 and 0.1."""

    def vocabulary(self, data: DataConfig) -> int:
        return 5

    def fit(self, data: DataConfig) -> None:
        if data.seq_len % 2 or data.seq_len < 4:
            near = max(4, data.seq_len + 1)
            raise ValueError(
                f"ignore={self.ignore} needs rows of pairs, at least two, not data.seq_len={data.seq_len}; use data.seq_len={near}"
            )

    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        n = seq_len // 2
        lots, bits = draws.uniform(n), draws.integers(2, n)
        instructions = np.where(lots < self.ignore, IGNORE, np.where(lots < (1 + self.ignore) / 2, WRITE, READ))
        instructions[:, 0], instructions[:, -1] = WRITE, READ
        written = np.maximum.accumulate(np.where(instructions == WRITE, np.arange(n), 0), axis=1)
        bits = ZERO + np.where(instructions == READ, np.take_along_axis(bits, written, axis=1), bits)
        tokens, targets = np.empty((draws.num_rows, seq_len), np.int64), np.full((draws.num_rows, seq_len), NOT_ASKED)
        tokens[:, ::2], tokens[:, 1::2] = instructions, bits
        targets[:, ::2] = np.where(instructions == READ, bits, NOT_ASKED)
        return tokens, targets

    def scores(self, batch: Batch, nll: np.ndarray, right: np.ndarray) -> Mapping[str, tuple[float, float]]:
        reads, rightly = float(batch.loss_mask.sum()), float(right.sum())
        return {"accuracy": (rightly, reads), "glitch_rate": (reads - rightly, reads)}
