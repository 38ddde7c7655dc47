"""Where a run's time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Wall time of a run over all its sessions, and the part of it spent stepping since the last lap."""

    def __init__(self, seconds: float = 0.0):
        """Args: `seconds` already spent by earlier sessions of the run."""
        self._origin = time.perf_counter() - seconds
        self._lap_start = time.perf_counter()
        self._steps = self._tokens = 0

    @property
    def seconds(self) -> float:
        """Since the start of the run."""
        return time.perf_counter() - self._origin

    def count(self, tokens: int) -> None:
        """One more step of `tokens` tokens."""
        self._steps += 1
        self._tokens += tokens

    def lap(self) -> tuple[float, float]:
        """Seconds a step and tokens a second since the last lap, pauses left out; starts a new lap."""
        now = time.perf_counter()
        elapsed, steps, tokens = now - self._lap_start, max(self._steps, 1), self._tokens
        self._lap_start, self._steps, self._tokens = now, 0, 0
        return elapsed / steps, tokens / elapsed

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (evaluating, saving) is not stepping."""
        start = time.perf_counter()
        yield
        self._lap_start += time.perf_counter() - start
