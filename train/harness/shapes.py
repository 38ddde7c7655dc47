"""The few shapes in which texts of any length are read, so that few programs are compiled."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plait.configs.experiment import ExperimentConfig
from plait.kernels import Tokens
from plait.models.axes import BATCH, LENGTH
from plait.train.convert.sample import rows_of
from plait.train.mesh import spec, ways
from plait.train.scoring.generate import padded

_UNIT = 64
"""Tokens of the shortest row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """Rows of one of few lengths, as many at once as a number of tokens allows."""

    mesh: Mesh
    microbatches: int
    """Parts in which rows flow through a pipeline."""
    each: int
    """What rows are a multiple of."""
    longest: int
    """Tokens of the longest row."""
    tokens: int
    """Tokens read at once, at most where a row of each device has no more."""

    @classmethod
    def of(cls, config: ExperimentConfig, mesh: Mesh, longest: int, tokens: int) -> Shapes:
        """Those that divide over a mesh. Raises ValueError where the longest row does not."""
        microbatches, each = rows_of(config, mesh, 1)
        length = ways(mesh, LENGTH)
        if length > 1 and longest % (2 * length):
            raise ValueError(
                f"max_length={longest} must be a multiple of 2 x mesh.context={length}, for each device two equal halves; "
                f"use {2 * length * max(1, longest // (2 * length))}"
            )
        return cls(mesh=mesh, microbatches=microbatches, each=each, longest=longest, tokens=tokens)

    def width(self, length: int) -> int:
        """The row for a text of `length` tokens: 1, 1.5, 2, 3, 4, 6, ... times the shortest, or the longest."""
        unit = math.lcm(_UNIT, 4 * ways(self.mesh, LENGTH))
        sizes = (size for power in itertools.count() for size in (unit << power, 3 * (unit << power) // 2))
        return min(next(size for size in sizes if size >= length), self.longest)

    def rows(self, width: int, left: int) -> int:
        """Rows of this width read at once where `left` are to be read."""
        most = max(1, self.tokens // (width * self.each))
        return self.each * min(most, 1 << (math.ceil(left / self.each) - 1).bit_length())

    def place(self, texts: Sequence[Sequence[int]], width: int, rows: int) -> Tokens:
        """Texts that end where their row ends, over the mesh; rows without one are padding."""
        at, _ = padded(texts, width, rows)
        return jax.tree.map(lambda array: self._over(array, spec((BATCH, LENGTH))), at)

    def everywhere(self, array: np.ndarray) -> jax.Array:
        """An array that each device has whole."""
        return self._over(array, PartitionSpec())

    def _over(self, array: np.ndarray, partition: PartitionSpec) -> jax.Array:
        return jax.make_array_from_callback(array.shape, NamedSharding(self.mesh, partition), array.__getitem__)
