"""Many needles in a haystack: numbers for keys, some of which are asked for, as bytes.

Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about the numbers afterwards.
.. text One of the special magic numbers for abcdef is: 1234567. text One of the special magic numbers for uvwxyz is: 7654321. text ..
What are all the special magic numbers for .. mentioned in the provided text? The special magic numbers for .. in the text are ..
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import numpy as np

from plait.configs.domains import Share, Whole
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.haystack import HaystackTask, Story, codes
from plait.data.tasks.needle import DEPTHS

if TYPE_CHECKING:
    from plait.data.batch import Batch

_KEY, _DIGITS = 6, 7


@TASKS.register(
    "needles", source="RULER (2404.06654): needles of several keys, values and queries; keys are words of random letters"
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedlesTask(HaystackTask):
    """Numbers for keys in text: the share of bytes told, of numbers told whole, the same by depth, and of rows with all of them."""

    answer_length = _DIGITS

    num_keys: Annotated[int, Whole(1, 1024)] = 2
    """Keys that have numbers in the text; those that are not asked for distract."""
    num_values: Annotated[int, Whole(1, 64)] = 1
    """Numbers of each key, to be told in the order in which they stand."""
    num_queries: Annotated[int, Whole(1, 64)] = 1
    """Keys that are asked for."""
    depth: Share | None = None
    """Share of the text before the needles that are asked for; None is any."""

    def check(self) -> None:
        if self.num_queries > self.num_keys:
            raise ValueError(
                f"num_queries={self.num_queries} must be at most num_keys={self.num_keys}, of which they are asked; use {self.num_keys} or less"
            )

    @property
    def num_answers(self) -> int:
        return self.num_queries * self.num_values

    def stories(self, draws: Draws) -> list[Story]:
        count = self.num_keys * self.num_values
        keys = codes(draws.distinct(26**_KEY, self.num_keys), _KEY)
        values = 10 ** (_DIGITS - 1) + draws.distinct(9 * 10 ** (_DIGITS - 1), count)
        shares = draws.uniform(count)
        if self.depth is not None:
            shares[:, : self.num_answers] = self.depth
        return [self._story(*row) for row in zip(keys, values.tolist(), shares.tolist())]

    def _story(self, keys: list[str], values: list[int], shares: list[float]) -> Story:
        one = self.num_answers == 1
        first, what, be = ("A", "number", "is") if one else ("Some", "numbers", "are")
        of = [key for key in keys for _ in range(self.num_values)]
        needles = sorted(zip(shares, of, values), key=lambda needle: needle[0])
        asked = keys[: self.num_queries]
        names = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
        told = f"special magic {what} for {names} mentioned in the provided text"
        return Story(
            f"{first} special magic {what} {be} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {what} afterwards.",
            [(share, f"One of the special magic numbers for {key} is: {value}.") for share, key, value in needles],
            f"What {'is' if one else 'are all'} the {told}? The {told} {be}",
            [str(value) for name in asked for _, key, value in needles if key == name],
        )

    def scores(self, batch: Batch, nll: np.ndarray, right: np.ndarray) -> Mapping[str, tuple[float, float]]:
        rows, found = self.found(batch, right)
        answers = batch.targets[rows][batch.loss_mask[rows] > 0].astype(np.uint8).reshape(*found.shape, _DIGITS)
        parts = np.zeros(found.shape, int)
        for row, (told, tokens) in enumerate(zip(answers, batch.tokens[rows].astype(np.uint8))):
            text = tokens.tobytes()
            start, stop = text.index(b"\n"), text.rindex(b"\n")
            for k, answer in enumerate(told):
                parts[row, k] = DEPTHS * (text.index(b": " + answer.tobytes() + b".") - start) // (stop - start)
        sums = dict(super().scores(batch, nll, right))
        for part in np.unique(parts).tolist():
            here = found[parts == part]
            sums[f"found_at_{100 * part // DEPTHS:02d}_to_{100 * (part + 1) // DEPTHS}"] = float(here.sum()), float(here.size)
        return sums
