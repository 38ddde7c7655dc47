"""The base of tasks that hide sentences in text and ask for what they said.

    tokens    opening .. text .. sentence .. text .. sentence .. text \\n question  12345, 67890
    targets    .                                                               .    12345  67890

Tokens are bytes. Each byte of an answer is asked for where the one before it stands; the commas between answers are given. All
answers of a task are of one length, as are all its rows without the text.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np

from plait.configs.domains import SomeSpan
from plait.data.config import DataConfig, DataError
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED, GeneratedTask
from plait.data.tasks.needle import FILLER

if TYPE_CHECKING:
    from plait.data.batch import Batch
    from plait.data.loader import Data, Reading

_MOST_BYTES = 1 << 20
"""Of the text of a source that are read."""
BETWEEN = ", "
"""What parts answers."""
BYTES = 256


class Story(NamedTuple):
    """What a row says beside the text."""

    opening: str
    hidden: Sequence[tuple[float, str]]
    """Sentences in the order in which they come, each with the share of the text before it, ascending."""
    question: str
    answers: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HaystackTask(GeneratedTask):
    """Sentences in text: the share of the answers' bytes that are right, that of answers told whole, and that of rows with all of them."""

    reads_bytes = True
    answer_length: ClassVar[int]
    """Bytes of each answer."""

    filler: SomeSpan | None = None
    """Bytes of text in which the sentences are hidden; None fills the row."""
    haystack: Literal["text", "repeat"] = "text"
    """Passages of the text of `data.source`, or a few sentences over and over."""

    @property
    @abc.abstractmethod
    def num_answers(self) -> int:
        """Answers of a row."""

    @abc.abstractmethod
    def stories(self, draws: Draws) -> list[Story]:
        """What each row says, all of one length."""

    def vocabulary(self, data: DataConfig) -> int:
        return BYTES

    def fit(self, data: DataConfig) -> None:
        least, filler = self._length, self.filler or 0
        if least + filler > data.seq_len:
            less = f"use {data.seq_len - least} or less, or " if self.filler and data.seq_len >= least else "use "
            raise ValueError(
                f"filler={self.filler} needs rows of at least {least + filler} tokens, {least} of them for what is hidden and asked, not "
                f"data.seq_len={data.seq_len}; {less}data.seq_len={least + filler} or more"
            )

    def open(self, data: DataConfig, folder: Path, rows: np.ndarray | None, reading: Reading | None) -> Data:
        made = super().open(data, folder, rows, reading)
        if self.haystack == "repeat":
            return made
        text = _text_of(data.source, data.text_field)
        read = {
            stream: functools.partial(self._read, data, functools.partial(self.generate, text=text), stream)
            for stream in ("train", "val")
        }
        identity = {**made.identity, "haystack": hashlib.sha256(text).hexdigest()}
        return dataclasses.replace(made, read_train=read["train"], read_val=read["val"], identity=identity)

    def generate(self, draws: Draws, seq_len: int, text: bytes | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As in the base; `text` is where passages are taken from, None the repeated sentences."""
        filler = seq_len - self._length if self.filler is None else self.filler
        starts = draws.integers(1 if text is None else len(text), 1)[:, 0]
        source = np.frombuffer(FILLER.encode() if text is None else text, np.uint8)
        tokens, targets = np.zeros((draws.num_rows, seq_len), np.int64), np.full((draws.num_rows, seq_len), NOT_ASKED)
        for row, (start, story) in enumerate(zip(starts, self.stories(draws))):
            passage = np.take(source, start + np.arange(filler), mode="wrap").tobytes()
            head = f"{story.opening}\n".encode() + _hidden(passage, story.hidden) + f"\n{story.question} ".encode()
            whole = np.frombuffer(head + BETWEEN.join(story.answers).encode(), np.uint8)
            tokens[row, : len(whole) - 1] = whole[:-1]
            first = len(head) + (self.answer_length + len(BETWEEN)) * np.arange(len(story.answers))
            places = (first[:, None] + np.arange(self.answer_length)).ravel()
            targets[row, places - 1] = whole[places]
        return tokens, targets

    def scores(self, batch: Batch, nll: np.ndarray, right: np.ndarray) -> Mapping[str, tuple[float, float]]:
        asked, found = self.found(batch, right)
        return {
            **super().scores(batch, nll, right),
            "found": (float(found.sum()), float(found.size)),
            "all_found": (float(found.all(1).sum()), float(len(asked))),
        }

    def found(self, batch: Batch, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows that ask something, and which of their answers are told whole, bool [R, answers]."""
        rows = np.flatnonzero(batch.loss_mask.any(1))
        told = right[rows][batch.loss_mask[rows] > 0]
        return rows, told.reshape(len(rows), self.num_answers, self.answer_length).all(-1)

    @functools.cached_property
    def _length(self) -> int:
        """Tokens of a row without text, up to its last answer, whose last byte is not among them."""
        story = self.stories(Draws(np.zeros(1, np.int64), self.name))[0]
        parts = [story.opening, *(f" {sentence}" for _, sentence in story.hidden), story.question, BETWEEN.join(story.answers)]
        return sum(map(len, parts)) + len("\n\n ") - 1


def _hidden(passage: bytes, hidden: Sequence[tuple[float, str]]) -> bytes:
    """A passage with sentences behind words of it."""
    spaces = [at for at, byte in enumerate(passage) if byte == ord(" ")] or [0]
    parts, last = [], 0
    for share, sentence in hidden:
        at = spaces[min(int(share * len(spaces)), len(spaces) - 1)]
        parts += [passage[last:at], f" {sentence}".encode()]
        last = at
    return b"".join([*parts, passage[last:]])


@functools.lru_cache(maxsize=2)
def _text_of(source: str, field: str) -> bytes:
    """The first of the text of a source, its documents parted by a line break. Raises DataError where it has none."""
    from plait.data.shards.prepared import is_prepared  # with the readers of files, which a config does not need
    from plait.data.sources.source import open_source

    found = bytearray()
    for document in () if is_prepared(source) else open_source(source, field).documents():
        found += document.text.encode() + b"\n" if document.text else b""
        if len(found) >= _MOST_BYTES:
            break
    if not found:
        raise DataError(
            f"data.source={source!r} holds tokens and no text to hide sentences in; give text, or use data.task.haystack=repeat"
        )
    return bytes(found[:_MOST_BYTES])


def codes(numbers: np.ndarray, length: int, first: str = "a") -> list[list[str]]:
    """Numbers below 26^length as words of so many letters, the alphabet beginning with `first`."""
    letters = numbers[..., None] // 26 ** np.arange(length)[::-1] % 26 + ord(first)
    return [["".join(map(chr, word)) for word in row] for row in letters.tolist()]
