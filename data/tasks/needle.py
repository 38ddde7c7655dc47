"""Needle in a haystack: a pass key somewhere in repeated text, to be told at the end.

    tokens    There is .. there.\\n  The grass is gr \\n  The pass key is 12345. Remember it. ..\\n  The grass ..\\n  What .. is  12345
    targets    .                                                                                                           12345 .

Tokens are bytes, so that a run on text with the byte tokenizer can be asked too. Each digit is asked for where what comes before it
stands: what is answered rightly as a whole is what greedy decoding gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import numpy as np

from plait.configs.domains import Share, SomeSpan, Whole
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED, GeneratedTask

if TYPE_CHECKING:
    from plait.data.batch import Batch

HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = ("\nThe pass key is ", ". Remember it. ", " is the pass key.\n")
QUESTION = "\nWhat is the pass key? The pass key is "
DEPTHS = 10
"""Parts of the haystack that are scored apart."""


def _ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64)


@TASKS.register("needle", source="Landmark Attention (2305.16300), its pass key test; needles by depth and length")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleTask(GeneratedTask):
    """A pass key in a haystack: the share of digits told, of keys told whole, and the same by depth."""

    reads_bytes = True

    filler: SomeSpan | None = None
    """Bytes of repeated text around the needle; None fills the row."""
    depth: Share | None = None
    """Share of that text before the needle; None is any, one as likely as another."""
    key_digits: Annotated[int, Whole(1, 15)] = 5
    """Digits of the key, the first of which is not 0."""

    def vocabulary(self, data: DataConfig) -> int:
        return 256

    def fit(self, data: DataConfig) -> None:
        least, filler = self._length(0), self.filler or 0
        if least > data.seq_len:
            raise ValueError(
                f"key_digits={self.key_digits} needs rows of at least {least} tokens, not data.seq_len={data.seq_len}; "
                f"use data.seq_len={least} or more"
            )
        if least + filler > data.seq_len:
            raise ValueError(
                f"filler={filler} must be at most data.seq_len={data.seq_len} less {least}; "
                f"use {data.seq_len - least} or less, or data.seq_len={least + filler} or more"
            )

    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        digits, filler, lots = self.key_digits, self._filler(seq_len), draws.uniform(self.key_digits + 1)
        before = (lots[:, :1] * (filler + 1)).astype(np.int64)
        if self.depth is not None:
            before[:] = round(self.depth * filler)
        least = (np.arange(digits) == 0).astype(np.int64)
        key = ord("0") + (least + lots[:, 1:] * (10 - least)).astype(np.int64)

        hay, needle = np.resize(_ids(FILLER), filler), _ids(("0" * digits).join(NEEDLE))
        at = np.arange(filler + len(needle))
        past = at - before  # the text begins anew behind the needle
        source = np.where(past < 0, at, np.where(past < len(needle), filler + past, past - len(needle)))
        body = np.concatenate([hay, needle])[source]
        first = before + len(NEEDLE[0]) + np.arange(digits)
        for places in (first, first + digits + len(NEEDLE[1])):
            np.put_along_axis(body, places, key, axis=1)

        parts = (_ids(HEAD) + 0 * before, body, _ids(QUESTION) + 0 * before, key[:, :-1])
        row = np.concatenate(parts, axis=1)
        tokens, targets = np.zeros((len(row), seq_len), np.int64), np.full((len(row), seq_len), NOT_ASKED)
        tokens[:, : row.shape[1]] = row
        targets[:, row.shape[1] - digits : row.shape[1]] = key
        return tokens, targets

    def scores(self, batch: Batch, nll: np.ndarray, right: np.ndarray) -> Mapping[str, tuple[float, float]]:
        asked = batch.loss_mask.any(1)
        found = right.sum(1) == self.key_digits
        sums = dict(super().scores(batch, nll, right), found=(float(found[asked].sum()), float(asked.sum())))
        is_digit = (batch.tokens >= ord("0")) & (batch.tokens <= ord("9"))
        before = is_digit.argmax(1) - len(HEAD) - len(NEEDLE[0])
        parts = np.minimum(DEPTHS * before // max(self._filler(batch.tokens.shape[1]), 1), DEPTHS - 1)
        for part in np.unique(parts[asked]).tolist():
            here = asked & (parts == part)
            sums[f"found_at_{100 * part // DEPTHS:02d}_to_{100 * (part + 1) // DEPTHS}"] = (
                float(found[here].sum()),
                float(here.sum()),
            )
        return sums

    def _length(self, filler: int) -> int:
        """Tokens of a row up to its last answer, which itself is not among them."""
        return len(HEAD) + filler + sum(map(len, NEEDLE)) + 2 * self.key_digits + len(QUESTION) + self.key_digits - 1

    def _filler(self, seq_len: int) -> int:
        return seq_len - self._length(0) if self.filler is None else self.filler
