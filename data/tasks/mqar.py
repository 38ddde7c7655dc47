"""Multi-query associative recall: pairs of key and value, then the keys again, each to be answered with its value.

    tokens    k1 v1 k2 v2 .. kn vn  |  .. k2 .. .. k1 ..      slots of two tokens; a query is the first of its slot
    targets    .  .  .  .     .  .  |  .. v2 .. .. v1 ..      the value, where the key is read; nothing elsewhere

Keys are distinct ids of 1 .. V/2 - 1 and values of V/2 .. V - 1, drawn anew for each row. The queries' slots s = 1, 2, ... are drawn
without replacement with probability in proportion to a s^(a - 1), so most queries come soon after the pairs.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import numpy as np

from plait.configs.domains import Length, Number, Vocabulary
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED, GeneratedTask


@TASKS.register("mqar", source="Zoology (arXiv 2312.04927)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MQARTask(GeneratedTask):
    """Multi-query associative recall: the share of keys whose value is recalled."""

    leaks_to_the_past = False

    vocab_size: Vocabulary = 8192
    """Ids V: half of them keys, half values."""
    num_kv_pairs: Length = 4
    """Pairs n in a row, and queries; 4 n tokens must fit."""
    power_a: Annotated[float, Number(above=0, least=1e-6, most=16)] = 0.01
    """Exponent a of the law of the queries' places: near 0 they come right after the pairs, at 1 anywhere."""
    filler: Literal["random", "zero"] = "random"
    """Tokens between the queries: any ids, keys among them, as in the authors' code since Based, or 0, as in the paper's figure 2."""

    def vocabulary(self, data: DataConfig) -> int:
        return self.vocab_size

    def fit(self, data: DataConfig) -> None:
        length = data.seq_len
        if length % 2:
            raise ValueError(
                f"num_kv_pairs={self.num_kv_pairs} needs rows of an even length, not data.seq_len={length}; use {length + 1}"
            )
        if 4 * self.num_kv_pairs > length:
            raise ValueError(
                f"num_kv_pairs={self.num_kv_pairs} must be at most a quarter of data.seq_len={length}; "
                f"use {length // 4} or less, or data.seq_len={4 * self.num_kv_pairs} or more"
            )
        if self.vocab_size <= length:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be above data.seq_len={length}; "
                f"use {length + 1} or more, or data.seq_len={(self.vocab_size - 1) // 2 * 2} or less"
            )

    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        n, half = self.num_kv_pairs, self.vocab_size // 2
        keys = 1 + draws.distinct(half - 1, n)
        values = half + draws.distinct(self.vocab_size - half, n)
        slots = np.arange(1, (seq_len - 2 * n) // 2 + 1)
        places = 2 * n + 2 * draws.distinct_by_weight(self.power_a * slots ** (self.power_a - 1), n)

        shape = (draws.num_rows, seq_len)
        tokens = draws.integers(self.vocab_size, seq_len) if self.filler == "random" else np.zeros(shape, np.int64)
        tokens[:, 0 : 2 * n : 2], tokens[:, 1 : 2 * n : 2] = keys, values
        targets = np.full(shape, NOT_ASKED)
        np.put_along_axis(tokens, places, keys, axis=1)
        np.put_along_axis(targets, places, values, axis=1)
        return tokens, targets
