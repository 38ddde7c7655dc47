"""The piece of a text that is looked at token by token."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from plait.train.inspection.heads import InspectError
from plait.train.probes.pictures import LENGTH


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens that are shown one by one, and those that are read before them."""

    ids: np.ndarray
    """int32 `[T]`: all that are read, as one document."""
    before: int
    """How many of them come before those that are shown."""
    words: str
    """Which tokens of the text are shown."""

    @property
    def name(self) -> str:
        """As what stands for all that come before is called."""
        return f"…{self.before}"

    @property
    def told(self) -> str:
        """What pictures say of it."""
        return f" {self.name} is all {self.before} tokens before together." if self.before else ""


def window_of(asked: str | None, text: np.ndarray, length: int, start: int | None) -> Window:
    """The window `FIRST:END` of a text `[N]`, END not included, after as much of what is before it as a row has room for; by default the first
    64 tokens, the start token among them.

    Args:
        length: tokens of a row.
        start: the token that a document begins with, where it has one.

    Raises:
        InspectError: it is no window, not in the text, or longer than may be.
    """
    has_start = int(start is not None)
    first, end = 0, min(LENGTH - has_start, length - has_start, len(text))
    if asked is not None:
        first, end = _ends(asked, len(text))
        most = min(LENGTH, length - has_start)
        if end - first > most:
            why = f"at most {LENGTH} are shown" if most == LENGTH else f"a row of {length} holds {most}; give a larger --length"
            raise InspectError(
                f"tokens={asked!r} has {end - first} tokens, and {why} or a shorter window, as {first}:{first + most}"
            )
    begin = max(0, end - (length - has_start))
    ids = np.append([] if start is None else [start], text[begin:end]).astype(np.int32)
    before = first - begin + has_start if first else 0
    before = before if before > 1 else 0  # the start token alone is shown as itself
    words = f"tokens {first:,} to {end - 1:,} of the text" if asked is not None else f"the first {len(ids)} tokens"
    return Window(ids, before, words)


def _ends(asked: str, size: int) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,12}):([0-9]{1,12})", asked.strip())
    if found is None:
        raise InspectError(
            f"tokens={asked!r} is no window of the text; write FIRST:END, both from 0 and END not included, as 128:192"
        )
    first, end = map(int, found.groups())
    if end > size or first >= end:
        rule = f"must begin before it ends, and end within the text's {size} tokens"
        raise InspectError(f"tokens={asked!r} {rule}; use {max(0, size - LENGTH)}:{size} for its last ones")
    return first, end
