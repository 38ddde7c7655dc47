"""How a batch lies on the mesh: which of its rows this host reads, and how they become global arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from plait.configs.experiment import ExperimentConfig
from plait.data.batch import Batch
from plait.data.config import DataConfig
from plait.train.mesh import batch_sharding


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """The place of a batch `[B, T]` on the devices of all hosts."""

    sharding: NamedSharding
    shape: tuple[int, int]

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The rows that this host's devices hold, ascending; hosts that hold other tokens of the same rows have the same ones."""
        parts: Mapping[Any, Any] = self.sharding.addressable_devices_indices_map(self.shape)
        held = {index[0].indices(self.shape[0])[:2] for index in parts.values()}
        return np.unique(np.concatenate([np.arange(*span) for span in held]))

    def place(self, batch: Batch) -> Batch:
        """Global arrays of a batch of which `batch` has the rows `rows`, each whole."""

        def part(array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
            first, stop, _ = index[0].indices(self.shape[0])
            start = int(np.searchsorted(self.rows, first))  # a device's rows follow one another here as they do in the batch
            return array[start : start + stop - first, index[1]]

        arrays = (np.asarray(array) for array in batch)
        return Batch(
            *(jax.make_array_from_callback(self.shape, self.sharding, functools.partial(part, array)) for array in arrays)
        )


def batch_layout(config: ExperimentConfig, mesh: Mesh, data: DataConfig | None = None) -> BatchLayout:
    """The layout of this experiment's batches, or of those of other data. Raises ValueError where they do not divide over the mesh."""
    data = data or config.data
    sharding = batch_sharding(mesh, data.batch_size, data.seq_len, config.optimizer.accumulate)
    return BatchLayout(sharding, (data.batch_size, data.seq_len))
