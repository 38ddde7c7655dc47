"""Variable tracking: assignments scattered over text, and the question which variables have a value, as bytes.

Memorize and track the chain(s) of variable assignment hidden in the following text.
.. text VAR ABCDE = 12345 text VAR FGHIJ = VAR ABCDE text VAR KLMNO = VAR FGHIJ text ..
Question: Find all variables that are assigned the value 12345 in the text above. Answer: .. they are: ABCDE, FGHIJ, KLMNO
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import numpy as np

from plait.configs.domains import Whole
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.haystack import HaystackTask, Story, codes

if TYPE_CHECKING:
    from plait.data.batch import Batch

_NAME = 5


@TASKS.register("variable_tracking", source="RULER (2404.06654), variable tracking")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VariableTrackingTask(HaystackTask):
    """Chains of assignments in text: the share of bytes told, of variables told whole, the same by hop, and of rows with all of them."""

    answer_length = _NAME

    num_chains: Annotated[int, Whole(1, 256)] = 1
    """Chains of variables, each with a value of its own, of which one is asked for."""
    num_hops: Annotated[int, Whole(1, 64)] = 4
    """Variables of a chain behind the first, each assigned the one before it."""

    @property
    def num_answers(self) -> int:
        return self.num_hops + 1

    def stories(self, draws: Draws) -> list[Story]:
        chains, length = self.num_chains, self.num_hops + 1
        names = codes(draws.distinct(26**_NAME, chains * length), _NAME, "A")
        values = 10_000 + draws.distinct(90_000, chains)
        shares = np.sort(draws.uniform(chains * length).reshape(-1, chains, length), axis=-1)
        return [self._story(*row) for row in zip(names, values.tolist(), shares.tolist())]

    def _story(self, names: list[str], values: list[int], shares: list[list[float]]) -> Story:
        length = self.num_hops + 1
        hidden: list[tuple[float, str]] = []
        for chain, value in enumerate(values):
            mine = names[chain * length : (chain + 1) * length]
            said = [f"VAR {mine[0]} = {value}", *(f"VAR {one} = VAR {before}" for before, one in itertools.pairwise(mine))]
            hidden += zip(shares[chain], said)
        return Story(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n",
            sorted(hidden, key=lambda one: one[0]),
            f"Question: Find all variables that are assigned the value {values[0]} in the text above. "
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{length} variables are assigned the value {values[0]}, they are:",
            names[:length],
        )

    def scores(self, batch: Batch, nll: np.ndarray, right: np.ndarray) -> Mapping[str, tuple[float, float]]:
        rows, found = self.found(batch, right)
        hops = {f"found_hop_{k}": (float(found[:, k].sum()), float(len(rows))) for k in range(self.num_answers)}
        return {**super().scores(batch, nll, right), **hops}
