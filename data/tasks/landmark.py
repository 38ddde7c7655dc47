"""Text with landmark tokens, which landmark attention is trained on.

tokens    the  cat  sat  [L]   on  the  mat  [L]      blocks of 4, the landmark included
targets   cat  sat   -    on  the  mat   -    .       a landmark predicts what the token before it would
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from plait.configs.domains import Span
from plait.data.landmarks import Landmarks
from plait.data.tasks.base import TASKS
from plait.data.tasks.ppl import PerplexityTask

if TYPE_CHECKING:
    from plait.data.config import DataConfig
    from plait.data.loader import Data, Reading, ReadRows


@TASKS.register("landmark", source="Landmark Attention (2305.16300), section 3")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LandmarkTask(PerplexityTask):
    """Text as of `ppl`, with a landmark token at the end of every block of a document: what the mixer `landmark` is trained on.

    The landmark is one id more than the tokenizer has. Rows are as long as `seq_len` says, landmarks included; loss, perplexity and bits per
    byte are of the same text as without them.
    """

    extra_ids = 1

    block_size: Span = 64
    """Tokens of a block, the landmark included; that of `model.mixers.landmark`."""

    def check(self) -> None:
        super().check()
        if self.block_size < 2:
            raise ValueError(f"block_size={self.block_size} must hold a token and its landmark; use 64")

    def fit(self, data: DataConfig) -> None:
        if self.block_size > data.seq_len:
            raise ValueError(
                f"block_size={self.block_size} is more than data.seq_len={data.seq_len}, so that no row has a landmark; "
                f"use {data.seq_len} or less"
            )

    def landmarks(self, tokenizer_size: int) -> Landmarks:
        return Landmarks(self.block_size, tokenizer_size)

    def open(self, data: DataConfig, folder: Path, rows: np.ndarray | None, reading: Reading | None) -> Data:
        plain = dataclasses.replace(data, task=PerplexityTask(), seq_len=Landmarks(self.block_size, 0).room(data.seq_len))
        text = super().open(plain, folder, rows, reading)
        landmarks = self.landmarks(text.vocab_size)

        def with_landmarks(read: ReadRows) -> ReadRows:
            return lambda index: landmarks.into_rows(read(index), data.seq_len)

        return dataclasses.replace(
            text,
            config=data,
            vocab_size=text.vocab_size + self.extra_ids,
            read_train=with_landmarks(text.read_train),
            read_val=with_landmarks(text.read_val),
            identity={"task": self.name, "task.block_size": self.block_size, **text.identity, "seq_len": data.seq_len},
        )
