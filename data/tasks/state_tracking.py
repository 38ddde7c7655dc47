"""State tracking: elements of a group, and at each the product of all up to it.

tokens    g1   g2    g3      ..  gT
targets   g1  g1g2  g1g2g3   ..  g1..gT

An element is an id, 0 the identity. A permutation's is its place among those of the group in order of their images, and the product
a b sends i to a[b[i]]; Zn adds modulo n, so Z2 is parity.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Literal

import numpy as np

from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import GeneratedTask


@functools.cache
def products(group: str) -> np.ndarray:
    """Ids of the products of two elements, int64 [N, N]."""
    kind, size = group[0], int(group[1:])
    if kind == "Z":
        return np.add.outer(np.arange(size), np.arange(size)) % size
    images = np.asarray(list(itertools.permutations(range(size))))
    first, second = np.triu_indices(size, 1)
    if kind == "A":
        images = images[(images[:, first] > images[:, second]).sum(1) % 2 == 0]
    places = size ** np.arange(size)[::-1]  # a permutation as a number rises with its images
    return np.searchsorted(images @ places, images[:, images] @ places)


@TASKS.register("state_tracking", source="The Illusion of State (2404.08819); Barrington's theorem for A5 and S5")
@dataclasses.dataclass(frozen=True, kw_only=True)
class StateTrackingTask(GeneratedTask):
    """The word problem of a group: the share of prefixes whose product is known."""

    leaks_to_the_past = False

    group: Literal["Z2", "Z60", "S3", "A5", "S5"] = "S5"
    """Z2 is parity; Z60 and A5 have as many elements, and only A5 is not solvable; S5 holds A5."""

    def vocabulary(self, data: DataConfig) -> int:
        return len(products(self.group))

    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        table = products(self.group)
        tokens = draws.integers(len(table), seq_len)
        states, span = tokens.copy(), 1
        while span < seq_len:  # the product of the last `span` elements becomes that of the last 2 `span`
            states[:, span:] = table[states[:, :-span], states[:, span:]]
            span *= 2
        return tokens, states
