"""Language modelling of the text in `data.source`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from plait.data.tasks.base import TASKS, Task

if TYPE_CHECKING:
    from plait.data.config import DataConfig
    from plait.data.loader import Data, Reading


@TASKS.register("ppl", source="the text of data.source")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityTask(Task):
    """Text, packed into rows: loss, perplexity, bits per byte and loss by position on what is held out."""

    reads_text = True
    has_answers = False
    counts_bytes = True

    def vocabulary(self, data: DataConfig) -> int | None:
        return None if data.tokenizer_size is None else data.tokenizer_size + self.extra_ids

    def open(self, data: DataConfig, folder: Path, rows: np.ndarray | None, reading: Reading | None) -> Data:
        from plait.data.text import open_text  # with the readers of files, which a config does not need

        return open_text(data, folder, rows, reading)
