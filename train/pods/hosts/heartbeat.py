"""What a training process tells its supervisor: that it lives, what it is doing, and when it last got on with it. Needs no JAX.

A thread writes the file once a second, and each new phase is written at once. So whether the file changes says whether the process runs
at all, and what is in it says for how long the same phase or step has been going on. No clock time is in it: clocks are set, and differ.
A process whose supervisor has died ends itself as on SIGTERM.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from plait.configs.files import write_atomically

VARIABLE = "PLAIT_HEARTBEAT"
"""Environment variable with the path of the file; without it nothing is written."""


_PAUSE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class State:
    """What the file holds."""

    phase: str = "start"
    step: int = 0
    """The last that was done."""
    slowest: float = 0.0
    """Seconds of the slowest step."""
    age: float = 0.0
    """Seconds since the phase or step began or got on, those left out in which the whole process was stopped."""
    beat: int = 0
    """Counts the writes."""


class Heartbeat:
    """The state of this process, written to `path` once a second until it ends."""

    def __init__(self, path: Path):
        self._path = path
        self._phase, self._step, self._slowest, self._beat = "start", 0, 0.0, 0
        self._stopped = 0.0
        """Seconds in which the process was stopped."""
        self._since = self._now()
        self._writing = threading.Lock()
        self._supervisor: int | None = os.getppid()
        self._write()
        threading.Thread(target=self._run, daemon=True, name="heartbeat").start()

    def enter(self, phase: str) -> str:
        """Another phase; gives the one before."""
        before, self._phase, self._since = self._phase, phase, self._now()
        self._write()
        return before

    def step(self, step: int) -> None:
        """`step` is done."""
        now = self._now()
        if self._phase == "step":
            self._slowest = max(self._slowest, now - self._since)
        self._phase, self._step, self._since = "step", step, now

    def advance(self) -> None:
        """What the phase does has got on."""
        self._since = self._now()

    def _now(self) -> float:
        return time.monotonic() - self._stopped

    def _run(self) -> None:
        while True:
            before = time.monotonic()
            time.sleep(1.0)
            if (passed := time.monotonic() - before) > _PAUSE_SECONDS:
                self._stopped += passed - 1.0
            self._write()
            if self._supervisor is not None and os.getppid() != self._supervisor:  # nobody watches any more, or starts this again
                self._supervisor = None
                os.kill(os.getpid(), signal.SIGTERM)

    def _write(self) -> None:
        with self._writing, contextlib.suppress(OSError):
            self._beat += 1
            state = State(self._phase, self._step, self._slowest, max(self._now() - self._since, 0.0), self._beat)
            write_atomically(
                self._path, json.dumps(dataclasses.asdict(state)), durable=False
            )  # a slow disk must not look like silence


_current: Heartbeat | None = None


def start() -> None:
    """Begins to write, where a supervisor asks for it."""
    global _current  # noqa: PLW0603 (one a process)
    if path := os.environ.get(VARIABLE):
        _current = Heartbeat(Path(path))


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """What is done inside has a limit of its own."""
    if _current is None:
        yield
        return
    before = _current.enter(name)
    try:
        yield
    finally:
        _current.enter(before)


def advance(*_: object) -> None:
    """The phase has got on: its limit is one of silence, not of length."""
    if _current is not None:
        _current.advance()


def step(number: int) -> None:
    """Training step `number` is done."""
    if _current is not None:
        _current.step(number)
