"""Which source each row of a mixture is from: a function of the row's number, that can be asked of any row.

Row g has the place x(g) in [0, 1), the bits of g in reverse order: the sequence of van der Corput, which fills the interval evenly from the
first row on, so that shares hold in any stretch of rows and a small source gets its part. A source has the rows whose place lies in its
own part of the interval. How many of those come before row g is counted bit by bit of g.

Source: van der Corput, Verteilungsfunktionen (1935); the shift by a random number: random digital shifts, as in Lemieux, Monte Carlo and
Quasi-Monte Carlo Sampling (2009), section 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from plait.data.splitmix import salted

BITS = 40
_WHOLE = 1 << BITS


@dataclasses.dataclass(frozen=True)
class Share:
    """What a source asks for.

    Attributes:
        weights: by the row from which on each holds, ascending, the first from row 0 on.
        limit: rows after which it is used up; None for none.
    """

    weights: tuple[tuple[int, float], ...]
    limit: int | None = None

    def weight(self, row: int) -> float:
        """The one that holds at a row."""
        return [weight for first, weight in self.weights if first <= row][-1]


@dataclasses.dataclass(frozen=True)
class _Phase:
    """Rows among which nothing changes."""

    first: int
    edges: tuple[int, ...]
    """[S + 1], of the parts of the interval, of `2 ** BITS`."""
    before: tuple[int, ...]
    """[S], rows of each source before the first."""
    end: int | None


class Schedule:
    """The source of each row, and its number among the rows of that source.

    Args:
        shares: of each source.
        seed: sets orders apart.
    """

    def __init__(self, shares: Sequence[Share], seed: int) -> None:
        self._shares = shares
        self._shift = int(salted(np.zeros(1, np.uint64), "sources", seed)[0]) % _WHOLE
        self._phases: list[_Phase] = []
        self.num_rows: int | None = None
        """Rows there are before all sources are used up; None where that never happens."""
        first, before = 0, (0,) * len(shares)
        while True:
            phase = self._phase(first, before)
            if phase is None:
                self.num_rows = first
                return
            self._phases.append(phase)
            if phase.end is None:
                return
            counts = self._counts(phase, np.array([phase.end - phase.first]))[0]
            first, before = phase.end, tuple(int(a + b) for a, b in zip(before, counts, strict=True))

    def sources(self, rows: np.ndarray) -> np.ndarray:
        """The source of each row, int64 [R]."""
        return self.locate(rows)[0]

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each row, and how many rows of that source come before it, int64 [R] each."""
        source, number = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        firsts = np.array([phase.first for phase in self._phases])
        of = np.searchsorted(firsts, rows, side="right") - 1
        for index in np.unique(of).tolist():
            phase, here = self._phases[index], of == index
            within = rows[here] - phase.first
            place = _reversed(within) ^ self._shift
            own = np.searchsorted(np.array(phase.edges), place, side="right") - 1
            counts = self._counts(phase, within)
            source[here] = own
            number[here] = np.take_along_axis(counts, own[:, None], 1)[:, 0] + np.array(phase.before)[own]
        return source, number

    def counts(self, num_rows: int) -> list[int]:
        """How many of the first rows are of each source."""
        phase = [phase for phase in self._phases if phase.first <= num_rows][-1]
        found = self._counts(phase, np.array([num_rows - phase.first]))[0]
        return [int(a + b) for a, b in zip(phase.before, found, strict=True)]

    def _counts(self, phase: _Phase, within: np.ndarray) -> np.ndarray:
        """Rows of each source among the first `within` of a phase, [R, S]."""
        edges, mirror = np.array(phase.edges), _reversed(within)
        below = np.zeros((len(within), len(edges)), np.int64)  # numbers before `within` with a place below each edge
        for bit in range(int(within.max(initial=0)).bit_length()):
            # Those with the same upper bits, a 0 where `within` has this 1, and any lower bits: their places have one lower part.
            low = ((mirror & ((1 << (BITS - 1 - bit)) - 1)) ^ self._shift) & ((1 << (BITS - bit)) - 1)
            room = edges - low[:, None]
            below += np.where(((within >> bit) & 1)[:, None] & (room > 0), ((room - 1) >> (BITS - bit)) + 1, 0)
        return np.diff(below, axis=1)

    def _phase(self, first: int, before: tuple[int, ...]) -> _Phase | None:
        left = [None if share.limit is None else share.limit - done for share, done in zip(self._shares, before, strict=True)]
        weights = [0.0 if rest == 0 else share.weight(first) for share, rest in zip(self._shares, left, strict=True)]
        changes = [row for share in self._shares for row, _ in share.weights if row > first]
        if not any(weights):
            return None
        edges = [0, *(round(_WHOLE * part) for part in np.cumsum(weights) / np.sum(weights))]
        last = max(index for index, weight in enumerate(weights) if weight)
        edges[last + 1 :] = [_WHOLE] * (len(edges) - last - 1)
        phase = _Phase(first, tuple(edges), before, None)
        ends = [min(changes) - first] if changes else []
        for index, rest in enumerate(left):
            if rest is not None and weights[index]:
                ends.append(self._reached(phase, index, rest))
        return dataclasses.replace(phase, end=first + min(ends)) if ends else phase

    def _reached(self, phase: _Phase, source: int, count: int) -> int:
        """The least number of a phase's rows of which `count` are of a source."""
        low, high = 0, _WHOLE
        while low < high:
            middle = (low + high) // 2
            enough = self._counts(phase, np.array([middle]))[0, source] >= count
            low, high = (low, middle) if enough else (middle + 1, high)
        return low


def _reversed(x: np.ndarray) -> np.ndarray:
    """The lowest BITS bits of each number in reverse order, int64."""
    found = np.zeros_like(x)
    for bit in range(int(x.max(initial=0)).bit_length()):
        found |= ((x >> bit) & 1) << (BITS - 1 - bit)
    return found
