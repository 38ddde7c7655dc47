"""A process outside the runtime that starts the training process, watches it, and ends when it is dead, hung or done. Needs no JAX.

A host that dies leaves the others waiting or aborted in ways that Python cannot catch, so what watches must be another process. It sees
its own child die or hang at once; of a child elsewhere it learns by the coordinator, which aborts every process soon after one fell silent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from plait.configs import codec
from plait.train.pods.hosts import heartbeat
from plait.train.pods.hosts.heartbeat import State
from plait.train.pods.hosts.host import Host, HostsOptions

DONE, FAILED, BAD_INPUT, ENDED, STOPPED = 0, 1, 2, 3, 75
"""Exit statuses of `launch.py train`: done; failed, start again; bad input, do not; saved where an event stopped it, look first; saved on
a signal before the end (EX_TEMPFAIL), start again to go on."""
ORDERLY = (DONE, BAD_INPUT, ENDED, STOPPED)
"""With these all hosts end, each by itself."""

LAUNCH = (sys.executable, "-m", "plait.launch")
SILENCE_SECONDS = 30.0
"""A process whose heartbeat has not changed for so long is stopped, or stuck where no thread of it can run."""
PHASE_SECONDS: Mapping[str, float] = {"data": 1800, "wait": float("inf"), "weights": 6 * 3600, "compile": 3600, "step": 600}
"""Longest time in a phase in which nothing gets on; `step` is the first one, which also loads the program. Text that is tokenised gets on
with every few MiB, however much there is. Who waits for another host is ended by the supervisor of that one. Others: half an hour."""
_OTHER_SECONDS = 1800.0
_LEAVE_SECONDS = 30.0
_POLL_SECONDS = 0.2
_PAUSE_SECONDS = 2.0  # at most that counts between two looks: in a longer time this process was stopped itself
_SETTLE_SECONDS = 20.0


class Child:
    """One training process, started by `command`."""

    def __init__(self, command: Sequence[str], host: Host, folder: Path, options: HostsOptions):
        self.host, self._options = host, options
        self._file = folder / f"heartbeat-{host.index}.json"
        self._file.unlink(missing_ok=True)
        self._state, self._silent, self._looked = State(), 0.0, time.monotonic()
        where = {"COORDINATOR": host.coordinator, "HOST_COUNT": host.count, "HOST_INDEX": host.index}
        environment = {f"PLAIT_{name}": str(value) for name, value in where.items()}
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **environment, heartbeat.VARIABLE: str(self._file)},
            start_new_session=True,  # a Ctrl-C reaches it through the supervisor only
        )

    @property
    def name(self) -> str:
        return f"host {self.host.index} of {self.host.count}: the training process (pid {self.process.pid})"

    def status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self.process.poll()

    def hung(self) -> str | None:
        """Why it counts as hung, None while it gets on; to be asked again and again."""
        self._look()
        state, silent = self._state, self._silent
        if state.beat and silent > SILENCE_SECONDS:
            return f"has been silent for {silent:.0f} s in {_where(state)}: it is stopped or stuck"
        age, limit = state.age + silent, self._limit(state)
        if age > limit:
            return f"has been in {_where(state)} for {age:.0f} s of at most {limit:.0f}: it hangs, or waits for a host that does"
        return None

    def death(self) -> str:
        """What is known of its end by a status that is not orderly."""
        self._look()
        status, state = self.process.returncode, self._state
        if status == -signal.SIGABRT and state.phase in ("start", "connect"):
            return (
                f"did not meet the other hosts at hosts.coordinator={self.host.coordinator} within hosts.connect_seconds="
                f"{self._options.connect_seconds:.0f}; see that host 0 runs, that its port can be reached from here and that all "
                f"{self.host.count} hosts were started"
            )
        if status == -signal.SIGABRT:
            return f"was aborted in {_where(state)}: another host was lost, or did not answer; the log of that host says why"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name} in {_where(state)}"
        return f"failed with status {status} in {_where(state)}"

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()

    def _look(self) -> None:
        """Takes in what it wrote last, and for how long it has written nothing else."""
        now = time.monotonic()
        passed, self._looked = now - self._looked, now
        try:
            state = codec.load(State, self._file)
        except ValueError:
            state = self._state
        self._silent = 0.0 if state != self._state else self._silent + min(passed, _PAUSE_SECONDS)
        self._state = state

    def _limit(self, state: State) -> float:
        if state.phase == "connect":
            return self._options.connect_seconds + SILENCE_SECONDS
        if state.phase == "step" and state.slowest:
            return max(self._options.step_seconds, 10 * state.slowest)
        return PHASE_SECONDS.get(state.phase, _OTHER_SECONDS)


def supervise(arguments: Sequence[str], host: Host | None, options: HostsOptions, *, resumes: bool = True) -> int:
    """Runs `launch.py ARGUMENTS` as the training process of `host`, or `options.local` of them here; gives the exit status.

    Args: `resumes` says whether it takes `--resume`, or begins anew.
    """
    command = [*LAUNCH, *arguments]
    with Signals() as signals, tempfile.TemporaryDirectory(prefix="plait-") as folder:
        for left in range(options.restarts, -1, -1):
            hosts = [host] if host is not None else _local_hosts(options.local or 1)
            children = [Child(command, each, Path(folder), options) for each in hosts]
            signals.children = children
            status = _watch(children, signals)
            if status != FAILED or signals.asked or not left:
                break
            if host is not None:
                time.sleep(_SETTLE_SECONDS)  # until the coordinator of this attempt has ended everywhere
            if resumes and "--resume" not in command:
                command.append("--resume")
            _say(f"starting again, {left - 1} restarts left")
    if status == FAILED:
        again = "what was saved before stays, and the same command with --resume goes on from it"
        _say(f"the job has failed; {again if resumes else 'the same command begins anew'}")
    return status


def _watch(children: Sequence[Child], signals: Signals) -> int:
    """Until all have ended; the first that is dead or hung ends the others. Gives the exit status of the whole."""
    deadline = float("inf")
    try:
        while any(child.status() is None for child in children):
            time.sleep(_POLL_SECONDS)
            for child in children:
                status = child.status()
                if status is None and (problem := child.hung()) is not None:
                    _say(f"{child.name} {problem}; ending the job")
                    return FAILED
            if any(child.status() not in (None, *ORDERLY) for child in children):
                break
            if any(child.status() is not None for child in children):
                deadline = min(deadline, time.monotonic() + _LEAVE_SECONDS)
            if time.monotonic() > deadline:
                late = ", ".join(child.name for child in children if child.status() is None)
                _say(f"{late} did not end with the others; ending the job")
                return FAILED
            if signals.killed:
                return FAILED
        dead = [child for child in children if child.status() not in (None, *ORDERLY)]
        if dead:
            # One that was killed comes before those that its death ended.
            cause = min(dead, key=lambda child: (child.process.returncode > 0, child.process.returncode == -signal.SIGABRT))
            _say(f"{cause.name} {cause.death()}; ending the job")
            return FAILED
        return next(status for status in (BAD_INPUT, ENDED, STOPPED, DONE) if any(child.status() == status for child in children))
    finally:
        for child in children:
            child.kill()


def ending_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask for an end; SIGHUP is none where the caller had it ignored, as nohup does."""
    wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    return tuple(number for number in wanted if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN)


def _local_hosts(count: int) -> list[Host]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [Host(f"127.0.0.1:{port}", count, index) for index in range(count)]


def _where(state: State) -> str:
    return f"step {state.step + 1}" if state.phase == "step" else f"phase {state.phase!r}"


def _say(message: str) -> None:
    print(f"supervisor: {message}", file=sys.stderr, flush=True)


class Sendable(Protocol):
    """A process that takes signals."""

    def send(self, number: int) -> None:
        """Sends it one."""


class Signals:
    """Passes SIGTERM, Ctrl-C and the loss of the terminal on as SIGTERM, on which every host saves; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.asked = self.killed = False
        self.children: Sequence[Sendable] = ()

    def __enter__(self) -> Signals:
        self._old = {number: signal.signal(number, self._note) for number in ending_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self.asked:
            print("Ctrl-C: ending after what is in progress; a second one ends at once", file=sys.stderr, flush=True)
        self.killed = self.asked and number == signal.SIGINT
        self.asked = True
        for child in self.children:
            child.send(signal.SIGTERM)
