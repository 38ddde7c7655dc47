"""Ending before the end: SIGTERM (by which schedulers announce preemption and maintenance), SIGHUP (a terminal that is gone) and Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from types import FrameType

from jax.experimental import multihost_utils

from plait.train.pods.hosts import together
from plait.train.pods.hosts.supervise import ending_signals
from plait.train.terminal.status import end_now

log = logging.getLogger("plait")

_UNWIND_SECONDS = 1.0
"""So long a second Ctrl-C waits for the exception to leave the run by itself."""


class Termination:
    """Notes the signal, so that the step in progress is finished and saved. A second Ctrl-C interrupts at once.

    Python hears of a signal only when what the main thread does there ends, a compilation after minutes; a thread of its own hears of it
    at once, and says so. It ends the process where a second Ctrl-C finds the main thread in such a call, but not an interactive Python.

    On several hosts JAX's preemption service takes SIGTERM instead, on whichever of them it comes, and all learn of it at one step;
    SIGHUP is passed on as one.
    """

    asked = False
    """Whether to stop after the step last looked at."""
    compiling = True
    """Whether there is no program yet whose step could be waited for."""

    def __enter__(self) -> Termination:
        alone = together.count() == 1
        caught = [number for number in ending_signals() if alone or number == signal.SIGHUP]
        self._left, self._heard, self._said = threading.Event(), 0, threading.Lock()
        self._ear: socket.socket | None = None
        if alone:
            hearing, self._ear = socket.socketpair()
            self._ear.setblocking(False)
            threading.Thread(target=self._listen, args=(hearing, frozenset(caught)), daemon=True, name="signals").start()
            self._before = signal.set_wakeup_fd(self._ear.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, self._note if alone else _pass_on) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if self._ear is not None:
            signal.set_wakeup_fd(self._before)
            self._ear.close()

    def look(self, step: int) -> None:
        """Called after each step is dispatched, with its number; then `asked` is the same on all hosts."""
        if together.count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.asked = True
            if together.first():
                log.warning("SIGTERM on a host: all save after step %d, then stop; --resume goes on", step)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self.asked or self._heard > 1):
            raise KeyboardInterrupt
        self.asked = True
        self._say(number)

    def _listen(self, hearing: socket.socket, caught: frozenset[int]) -> None:
        with hearing:
            while numbers := hearing.recv(64):
                for number in numbers:
                    if number in caught:
                        self._hear(number)

    def _hear(self, number: int) -> None:
        """What the thread does of a signal, while the main thread may be in no Python."""
        self._heard += 1
        if self._heard == 1:
            self._say(number)
        elif number == signal.SIGINT and not hasattr(sys, "ps1") and not self._left.wait(_UNWIND_SECONDS):
            end_now()

    def _say(self, number: int) -> None:
        """Says once what the first signal brings about."""
        if not self._said.acquire(blocking=False):
            return
        now = "stopping after the compilation" if self.compiling else "saving after this step, then stopping"
        again = "; a second Ctrl-C ends it at once" if number == signal.SIGINT else ""
        log.warning("%s: %s; --resume goes on%s", signal.Signals(number).name, now, again)


def _pass_on(number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
