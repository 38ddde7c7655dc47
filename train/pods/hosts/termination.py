"""Ending before the end: SIGTERM (by which schedulers announce preemption and maintenance), SIGHUP (a terminal that is gone) and Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType

from jax.experimental import multihost_utils

from plait.train.pods.hosts import together
from plait.train.pods.hosts.supervise import ending_signals

log = logging.getLogger("plait")


class Termination:
    """Notes the signal, so that the step in progress is finished and saved. A second Ctrl-C interrupts at once.

    On several hosts JAX's preemption service takes SIGTERM instead, on whichever of them it comes, and all learn of it at one step;
    SIGHUP is passed on as one.
    """

    asked = False
    """Whether to stop after the step last looked at."""

    def __enter__(self) -> Termination:
        alone = together.count() == 1
        caught = [number for number in ending_signals() if alone or number == signal.SIGHUP]
        self._old = {number: signal.signal(number, self._note if alone else _pass_on) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def look(self, step: int) -> None:
        """Called after each step is dispatched, with its number; then `asked` is the same on all hosts."""
        if together.count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.asked = True
            if together.first():
                log.warning("SIGTERM on a host: all save after step %d, then stop; --resume goes on", step)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("%s: saving after this step, then stopping; --resume goes on", signal.Signals(number).name)


def _pass_on(number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
