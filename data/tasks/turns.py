"""Recall in several turns: pairs of key and value once, then turn by turn some of the keys, whose answers stay in the row.

    tokens    k1 v1 k2 v2 .. kn vn  . .  |  k4 v4 k2 v2  . .  |  k1 v1 k7 v7        | opens a turn; both stand for the id 0
    targets    .  .  .  .     .  .       .  v4  .  v2  .         v1  .  v7  .       a value is asked for at its key

No key is asked twice, so that no answer is in an earlier turn. What is left of the row is put before the turns in equal parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import numpy as np

from plait.configs.domains import Length, Vocabulary, Whole
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED, GeneratedTask

if TYPE_CHECKING:
    from plait.data.batch import Batch

TURN = 0
"""The id that opens a turn, and of the tokens before it."""


@TASKS.register("turns", source="after the shared contexts of SCBench (2412.10319), its multi-turn retrieval of values by key")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnsTask(GeneratedTask):
    """Values of keys, asked for over several turns: the share recalled, the same of each turn, and that of rows recalled throughout."""

    vocab_size: Vocabulary = 1024
    """Ids V: keys are 1 .. V/2 - 1, values V/2 .. V - 1."""
    num_kv_pairs: Length = 32
    """Pairs of the context."""
    num_turns: Annotated[int, Whole(1, 64)] = 4
    """Turns."""
    num_queries: Annotated[int, Whole(1, 1024)] = 2
    """Keys asked for in a turn."""

    def check(self) -> None:
        asked, half = self.num_turns * self.num_queries, self.vocab_size // 2
        if asked > self.num_kv_pairs:
            raise ValueError(
                f"num_queries={self.num_queries} in {self.num_turns} turns are {asked} keys, and num_kv_pairs={self.num_kv_pairs} must be "
                f"as many or more; use num_kv_pairs={asked}, or fewer turns or queries"
            )
        if self.num_kv_pairs > half - 1:
            raise ValueError(
                f"num_kv_pairs={self.num_kv_pairs} must be at most the {half - 1} keys of vocab_size={self.vocab_size}; "
                f"use vocab_size={2 * self.num_kv_pairs + 2} or more"
            )

    def vocabulary(self, data: DataConfig) -> int:
        return self.vocab_size

    def fit(self, data: DataConfig) -> None:
        needs = self._context + self.num_turns * self._turn
        if needs > data.seq_len:
            raise ValueError(
                f"num_kv_pairs={self.num_kv_pairs} with {self.num_turns} turns of {self.num_queries} queries needs rows of {needs} tokens, not "
                f"data.seq_len={data.seq_len}; use data.seq_len={needs} or more"
            )

    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        half, pairs = self.vocab_size // 2, self.num_kv_pairs
        keys = 1 + draws.distinct(half - 1, pairs)
        values = half + draws.distinct(self.vocab_size - half, pairs)
        chosen = draws.distinct(pairs, self.num_turns * self.num_queries)

        tokens, targets = np.full((draws.num_rows, seq_len), TURN), np.full((draws.num_rows, seq_len), NOT_ASKED)
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        places = self._places(seq_len)
        tokens[:, places] = np.take_along_axis(keys, chosen, axis=1)
        tokens[:, places + 1] = targets[:, places] = np.take_along_axis(values, chosen, axis=1)
        return tokens, targets

    def scores(self, batch: Batch, nll: np.ndarray, right: np.ndarray) -> Mapping[str, tuple[float, float]]:
        rows = batch.loss_mask.any(1)
        found = right[rows][:, self._places(right.shape[1])].reshape(-1, self.num_turns, self.num_queries)
        each = {f"accuracy_turn_{k + 1}": (float(found[:, k].sum()), float(found[:, k].size)) for k in range(self.num_turns)}
        return {**super().scores(batch, nll, right), **each, "whole": (float(found.all((1, 2)).sum()), float(len(found)))}

    @property
    def _context(self) -> int:
        return 2 * self.num_kv_pairs

    @property
    def _turn(self) -> int:
        return 1 + 2 * self.num_queries

    def _places(self, seq_len: int) -> np.ndarray:
        """Where keys are asked for, turn by turn."""
        turns = self.num_turns
        ends = self._context + (np.arange(1, turns + 1) * (seq_len - self._context)) // turns
        return (ends[:, None] - self._turn + 1 + 2 * np.arange(self.num_queries)).ravel()
