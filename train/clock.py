"""Where a run's time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Literal, NamedTuple


class Lap(NamedTuple):
    """Means over the steps of a lap, pauses left out."""

    step: float
    """Seconds a step."""
    tokens_per_second: float
    data: float
    """Seconds a step in which this host waited for its next batch."""
    own: float
    """Seconds a step in which this host did not wait for the devices: its batch, dispatch, and the reading of metrics."""


class Clock:
    """Wall time of a run over all its sessions, and the part of it spent stepping since the last lap."""

    def __init__(self, seconds: float = 0.0):
        """Args: `seconds` already spent by earlier sessions of the run."""
        self._origin = time.perf_counter() - seconds
        self._lap_start = time.perf_counter()
        self._steps = self._tokens = 0
        self._waits = {"data": 0.0, "devices": 0.0}

    @property
    def seconds(self) -> float:
        """Since the start of the run."""
        return time.perf_counter() - self._origin

    def count(self, tokens: int) -> None:
        """One more step of `tokens` tokens."""
        self._steps += 1
        self._tokens += tokens

    @contextlib.contextmanager
    def waiting(self, what: Literal["data", "devices"]) -> Iterator[None]:
        """Time inside is waited for `what`."""
        start = time.perf_counter()
        yield
        self._waits[what] += time.perf_counter() - start

    def lap(self) -> Lap:
        """What the steps since the last lap took; starts a new lap."""
        now = time.perf_counter()
        elapsed, steps, tokens = now - self._lap_start, max(self._steps, 1), self._tokens
        lap = Lap(elapsed / steps, tokens / elapsed, self._waits["data"] / steps, (elapsed - self._waits["devices"]) / steps)
        self._lap_start, self._steps, self._tokens = now, 0, 0
        self._waits = dict.fromkeys(self._waits, 0.0)
        return lap

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (evaluating, saving) is not stepping."""
        start = time.perf_counter()
        yield
        self._lap_start += time.perf_counter() - start
