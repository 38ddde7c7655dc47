"""Batches by step number: any step of any epoch, the same rows whatever the number of hosts, resumed exactly."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import grain
import numpy as np

from plait.data.batch import Batch
from plait.data.config import DataConfig, DataError
from plait.data.mixture.schedule import Schedule
from plait.data.tokenizers.tokenizer import Tokenizer

PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)  # batches made ahead of the step, in one thread

ReadRows = Callable[[np.ndarray], Batch]
"""The rows with these ascending numbers, [R, T], whatever other rows are read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What those know who only look at a run, whose folder they must leave as it is."""

    tokenizer: Tokenizer | None
    """The run's."""
    corpus: str | None
    """Fingerprint of the text it was trained on, None where that is not known, "" where no text here is it; any other is held out whole."""
    scratch: Path
    """Folder for what the run folder lacks."""


def differences(identity: Mapping[str, object], saved: Mapping[str, object]) -> str:
    """What of the data is not as it was saved, in words; empty where all is."""
    return "; ".join(f"{key} was {saved.get(key)!r} and is {mine!r}" for key, mine in identity.items() if saved.get(key) != mine)


class ValBatches(Sequence[Batch]):
    """The held-out rows in one fixed order, every row once; the last batch is filled up with rows of padding.

    So the first few batches are a fair sample of the whole. Of each batch of `batch_size` rows only those numbered `held` are read.
    """

    def __init__(self, read: ReadRows, num_rows: int, batch_size: int, held: np.ndarray) -> None:
        self._read, self._num_rows, self._batch_size, self._held = read, num_rows, batch_size, held

    def __len__(self) -> int:
        return math.ceil(self._num_rows / self._batch_size)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"validation batch {index} of {len(self)}")
        wanted = index % len(self) * self._batch_size + self._held
        real = wanted[wanted < self._num_rows]
        batch = self._read(real if len(real) else np.zeros(1, np.int64))
        padding = ((0, len(wanted) - len(real)), (0, 0))
        return Batch(*(np.pad(array[: len(real)], padding) for array in batch))


class DataIterator(Iterator[Batch]):
    """Training batches without end, made ahead in a background thread; its state is that of the last batch returned.

    Args:
        steps: batch of each step number.
        identity: what the order of rows depends on; a state with another identity is refused.
    """

    def __init__(self, steps: grain.MapDataset, identity: Mapping[str, object]) -> None:
        self._batches = iter(steps.to_iter_dataset(PREFETCH))
        self._identity = identity

    def __next__(self) -> Batch:
        return next(self._batches)

    @property
    def step(self) -> int:
        """The number of batches returned since the start of training."""
        return grain.experimental.get_next_index(self._batches)

    def get_state(self) -> dict[str, object]:
        """What `set_state` needs to go on after the last batch returned, on any number of hosts; small, and JSON."""
        return {"step": self.step, **self._identity}

    def other(self, state: dict[str, object]) -> str:
        """In what a saved state is of other data with the same tokens, in words; empty where `set_state` takes it or tokens differ."""
        same = self._identity.get("tokenizer") == state.get("tokenizer")
        return differences(self._identity, state) if same else ""

    def set_state(self, state: dict[str, object]) -> None:
        """Goes on where `state` was taken.

        Raises:
            DataError: it was taken with other data, or another order of it.
        """
        if changed := differences(self._identity, state):
            raise DataError(
                f"the data position in this checkpoint belongs to other data: {changed}; "
                "resume with the data it was trained on, or start a new run from its weights"
            )
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise DataError(
                f"the data position in this checkpoint has step={step!r}, not a number of batches; use another checkpoint"
            )
        grain.experimental.set_next_index(self._batches, step)

    def close(self) -> None:
        """Ends the background thread."""
        self._batches.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a run needs of its data: training batches, validation batches, and what their ids are.

    It is made of two functions that read rows, so that text and a generated task differ in those alone.
    """

    config: DataConfig
    vocab_size: int
    """Rows an embedding needs."""
    tokenizer: Tokenizer | None
    """Of text; None where ids stand for nothing."""
    read_train: ReadRows
    """Rows of training, numbered without end."""
    read_val: ReadRows
    """Held-out rows, in one fixed random order."""
    num_val_rows: int
    num_train_rows: int | None = None
    """Rows of an epoch; None where no row comes twice."""
    parts: Mapping[str, Data] = dataclasses.field(default_factory=dict)
    """Of a mixture, by name: what each source is alone."""
    schedule: Schedule | None = None
    """Of a mixture: the source of each row."""
    rows: np.ndarray | None = None
    """Those of each batch that are read here, ascending numbers in `range(batch_size)`; None for all."""
    identity: Mapping[str, object]
    """What the order of rows depends on; JSON."""
    facts: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """What else a run should write down; JSON."""

    @property
    def val(self) -> ValBatches:
        """The same validation batches every time; empty where nothing is held out."""
        return ValBatches(self.read_val, self.num_val_rows, self.config.batch_size, self._held)

    def train(self) -> DataIterator:
        """A new iterator at step 0."""
        first = lambda step: step * self.config.batch_size
        steps = grain.MapDataset.range(sys.maxsize).map(lambda step: self.read_train(first(step) + self._held))
        return DataIterator(steps, self.identity)

    def sources(self, batch: int) -> np.ndarray | None:
        """The number of each row's source in a training batch, int32 [B], whatever rows are read here; None without a mixture."""
        if self.schedule is None:
            return None
        first = batch * self.config.batch_size
        return self.schedule.sources(np.arange(first, first + self.config.batch_size)).astype(np.int32)

    def whole(self) -> Batch:
        """All rows of the first held-out batch, or of the first training batch where nothing is held out."""
        every = np.arange(self.config.batch_size)
        val = ValBatches(self.read_val, self.num_val_rows, self.config.batch_size, every)
        return val[0] if len(val) else self.read_train(every)

    def summary(self) -> dict[str, object]:
        """What a run should write down about its data; JSON."""
        return {**self.identity, "vocab_size": self.vocab_size, **self.facts}

    def strings(self, ids: Sequence[int]) -> list[str]:
        """What each id shows as: its text, or its number where it stands for nothing."""
        return [str(i) for i in ids] if self.tokenizer is None else self.tokenizer.token_strings(ids)

    @property
    def _held(self) -> np.ndarray:
        return np.arange(self.config.batch_size) if self.rows is None else np.asarray(self.rows, np.int64)


def build_data(config: DataConfig, folder: str | Path, *, rows: np.ndarray | None = None, reading: Reading | None = None) -> Data:
    """The batches of `config.task`. Batch n is the same for any `rows`, which says which rows of it are read here.

    Args:
        config: what to read.
        folder: the run folder, for what the task keeps.
        rows: ascending numbers in `range(batch_size)`; None for all.
        reading: for the held-out rows alone, of a finished run; None to train.

    Raises:
        DataError: what is to be read is not usable.
    """
    if config.sources:
        from plait.data.mixture.mixing import open_mixture  # with the readers of files, which a task may not need

        return open_mixture(config, Path(folder), rows, reading)
    return config.task.open(config, Path(folder), rows, reading)
