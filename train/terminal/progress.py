"""The line that says where training stands."""

import math
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from plait.train.terminal.console import notes

_BAR = 24
"""Columns."""


def format_seconds(seconds: float) -> str:
    """A duration in its two largest units: 45s, 3m 20s, 1h 02m, 2d 05h; a dash when it is not known."""
    if not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    for size, unit, next_size, next_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // next_size:02d}{next_unit}"
    return f"{whole}s" if seconds >= 1 or seconds == 0 else f"{seconds:.2g}s"


class ProgressLine:
    """Where training stands: one live line on a terminal, plain lines at least `interval_seconds` apart elsewhere."""

    def __init__(self, steps: int, *, start_step: int = 0, interval_seconds: float = 10.0, console: Console | None = None):
        self.steps, self.interval_seconds = steps, interval_seconds
        self.console = console or notes
        self._recent: deque[tuple[float, int]] = deque([(monotonic(), start_step)], maxlen=32)
        self._printed = -math.inf
        self._live: Progress | None = None
        if self.console.is_terminal:
            facts = TextColumn("{task.fields[facts]}", markup=False, style="none")
            self._live = Progress(BarColumn(_BAR), facts, console=self.console, refresh_per_second=4)
            self._task = self._live.add_task("train", total=steps, completed=start_step, facts="compiling")
            self._live.start()

    def update(
        self,
        step: int,
        *,
        loss: float,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
        watched: Sequence[str] = (),
    ) -> None:
        """Shows step `step` of `steps`, its loss, the speed, the model FLOP utilisation (0..1) if known, the time left, and of what is
        `watched` as much as the terminal has room for."""
        now = monotonic()
        self._recent.append((now, step))
        facts = [f"step {step:,}/{self.steps:,}", f"loss {loss:.4f}"]
        if tokens_per_second is not None and math.isfinite(tokens_per_second):
            facts.append(f"{tokens_per_second:,.0f} tok/s")
        if mfu is not None and math.isfinite(mfu):
            facts.append(f"MFU {mfu:.1%}")
        facts.append(f"left {format_seconds(self._seconds_left())}")
        if self._live:
            room = self.console.width - _BAR - 2
            watched = [text for i, text in enumerate(watched) if len("  ".join([*facts, *watched[: i + 1]])) <= room]
        line = "  ".join([*facts, *watched])
        if self._live:
            self._live.update(self._task, completed=step, facts=line)
        elif now - self._printed >= self.interval_seconds or step >= self.steps:
            self._printed = now
            self.message(line)

    def _seconds_left(self) -> float:
        """Time of the remaining steps at the speed of the last updates; the oldest kept is dropped first, compiling with it."""
        (start, first), (end, last) = self._recent[min(1, len(self._recent) - 2)], self._recent[-1]
        return (end - start) / (last - first) * (self.steps - last) if last > first else math.nan

    def message(self, text: str) -> None:
        """Prints a line of its own, above the live line where there is one."""
        self.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leaves the last state on the screen and gives the terminal back."""
        if self._live:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
