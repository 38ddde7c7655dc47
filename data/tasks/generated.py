"""The base of tasks whose rows are made on the fly."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from plait.configs.domains import SomeRows, TrainRows
from plait.data.batch import Batch
from plait.data.config import DataConfig
from plait.data.loader import Data, Reading
from plait.data.packing import shuffled_order
from plait.data.tasks.base import Task
from plait.data.tasks.draws import Draws

Make = Callable[[Draws, int], tuple[np.ndarray, np.ndarray]]
"""As `GeneratedTask.generate`."""
NOT_ASKED = -1
"""The target where nothing is to be predicted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedTask(Task):
    """Rows of ids, each made from its number and `data.seed`, so that any can be made without those before it."""

    train_rows: TrainRows | None = None
    """Rows to train on, which come again in every epoch, in another order; None makes new ones without end."""
    val_rows: SomeRows = 1024
    """Rows held out for validation, from a stream of their own; 0 holds out none."""

    @property
    def documents(self) -> int:
        """Sequences that a row is made of, side by side and of one length, none of which sees another."""
        return 1

    @abc.abstractmethod
    def vocabulary(self, data: DataConfig) -> int: ...

    @abc.abstractmethod
    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets of `draws.num_rows` sequences, integers [R, T]; the target is `NOT_ASKED` where nothing is to be predicted."""

    def open(self, data: DataConfig, folder: Path, rows: np.ndarray | None, reading: Reading | None) -> Data:
        fields = {f"task.{name}": value for name, value in dataclasses.asdict(self).items()}
        return Data(
            config=data,
            vocab_size=self.vocabulary(data),
            tokenizer=None,
            read_train=functools.partial(self._read, data, self.generate, "train"),
            read_val=functools.partial(self._read, data, self.generate, "val"),
            num_val_rows=self.val_rows,
            num_train_rows=self.train_rows,
            rows=rows,
            identity={
                "task": self.name,
                **fields,
                "seq_len": data.seq_len,
                "batch_size": data.batch_size,
                "seed": data.seed,
            },
        )

    def _row_numbers(self, seed: int, index: np.ndarray) -> np.ndarray:
        """Numbers of the rows at these places of training."""
        if self.train_rows is None:
            return index
        epochs, places = np.divmod(index, self.train_rows)
        numbers = np.empty_like(index)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = _order(self.train_rows, self.name, seed, int(epoch))[places[here]]
        return numbers

    def _read(self, data: DataConfig, make: Make, stream: str, index: np.ndarray) -> Batch:
        numbers = self._row_numbers(data.seed, index) if stream == "train" else index
        parts, length = self.documents, data.seq_len // self.documents
        numbers = (numbers[:, None] * parts + np.arange(parts)).ravel()
        tokens, targets = (array.reshape(len(index), -1) for array in make(Draws(numbers, self.name, data.seed, stream), length))
        asked = targets != NOT_ASKED
        return Batch(
            tokens=tokens.astype(np.int32),
            targets=np.where(asked, targets, 0).astype(np.int32),
            segment_ids=np.tile(np.repeat(np.arange(1, parts + 1, dtype=np.int32), length), (len(index), 1)),
            positions=np.tile(np.arange(length, dtype=np.int32), (len(index), parts)),
            loss_mask=asked.astype(np.float32),
        )


@functools.lru_cache(maxsize=4)
def _order(num_rows: int, *salt: object) -> np.ndarray:
    """The rows of an epoch, in its order."""
    return shuffled_order(np.arange(num_rows), *salt)
