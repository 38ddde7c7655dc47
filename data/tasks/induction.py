"""Induction: what followed a special token when it stood before is to be told when it comes again.

tokens     x x S a x x x x S     the special token S at any place, and at the end
targets    . . . . . . . . a     what came after it the first time; nothing elsewhere
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np

from plait.configs.domains import Whole
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED, GeneratedTask

LEAST = 4
"""Tokens of the shortest row: the special token, its successor, another one and the special token."""


@TASKS.register("induction", source="Hungry Hungry Hippos (2212.14052), section 3.1, and Mamba (2312.00752), section 4.1.2")
@dataclasses.dataclass(frozen=True, kw_only=True)
class InductionTask(GeneratedTask):
    """Induction heads: the share of rows in which the token behind the special one is recalled."""

    leaks_to_the_past = False

    vocab_size: Annotated[int, Whole(3, 2**21)] = 16
    """Ids, of which the last is the special token."""

    def vocabulary(self, data: DataConfig) -> int:
        return self.vocab_size

    def fit(self, data: DataConfig) -> None:
        if data.seq_len < LEAST:
            raise ValueError(
                f"vocab_size={self.vocab_size} needs rows in which a token comes twice, of {LEAST} tokens or more, not "
                f"data.seq_len={data.seq_len}; use data.seq_len={LEAST} or more"
            )

    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        special = self.vocab_size - 1
        tokens, place = draws.integers(special, seq_len), draws.integers(seq_len + 1 - LEAST, 1)
        np.put_along_axis(tokens, place, special, axis=1)
        tokens[:, -1] = special
        targets = np.full(tokens.shape, NOT_ASKED)
        targets[:, -1:] = np.take_along_axis(tokens, place + 1, axis=1)
        return tokens, targets
