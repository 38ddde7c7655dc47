"""The base of tasks whose rows are made on the fly."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from plait.configs.domains import SomeRows
from plait.data.batch import Batch
from plait.data.config import DataConfig
from plait.data.loader import Data, Reading
from plait.data.tasks.base import Task
from plait.data.tasks.draws import Draws

Make = Callable[[Draws, int], tuple[np.ndarray, np.ndarray]]
"""As `GeneratedTask.generate`."""
NOT_ASKED = -1
"""The target where nothing is to be predicted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedTask(Task):
    """Rows of ids, each made from its number and `data.seed`: no row comes twice, and any can be made without those before it."""

    val_rows: SomeRows = 1024
    """Rows held out for validation, from a stream of their own; 0 holds out none."""

    @abc.abstractmethod
    def vocabulary(self, data: DataConfig) -> int: ...

    @abc.abstractmethod
    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets of `draws.num_rows` rows, integers [R, T]; the target is `NOT_ASKED` where nothing is to be predicted."""

    def open(self, data: DataConfig, folder: Path, rows: np.ndarray | None, reading: Reading | None) -> Data:
        fields = {f"task.{name}": value for name, value in dataclasses.asdict(self).items()}
        return Data(
            config=data,
            vocab_size=self.vocabulary(data),
            tokenizer=None,
            read_train=functools.partial(self._read, data, self.generate, "train"),
            read_val=functools.partial(self._read, data, self.generate, "val"),
            num_val_rows=self.val_rows,
            rows=rows,
            identity={
                "task": self.name,
                **fields,
                "seq_len": data.seq_len,
                "batch_size": data.batch_size,
                "seed": data.seed,
            },
        )

    def _read(self, data: DataConfig, make: Make, stream: str, index: np.ndarray) -> Batch:
        tokens, targets = make(Draws(index, self.name, data.seed, stream), data.seq_len)
        asked = targets != NOT_ASKED
        return Batch(
            tokens=tokens.astype(np.int32),
            targets=np.where(asked, targets, 0).astype(np.int32),
            segment_ids=np.ones(tokens.shape, np.int32),
            positions=np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1)),
            loss_mask=asked.astype(np.float32),
        )
