"""The workers of a sweep on this machine, each a process of its own: one that dies is started again and goes on with its run."""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import platform
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from plait.train.pods.hosts.supervise import BAD_INPUT, DONE, FAILED, LAUNCH, STOPPED, Signals
from plait.train.run_folder.owner import FolderInUse, owned
from plait.train.sweep.record import Sweep, read
from plait.train.sweep.runs import Run
from plait.train.sweep.workers import claims
from plait.train.sweep.workers.devices import Share
from plait.train.sweep.workers.news import News

log = logging.getLogger("plait")

WORKER = "PLAIT_SWEEP_WORKER"
"""Set for a process that is a worker; what it must know besides comes by its standard input."""
MOST_DEATHS = 2
"""Workers that may die in one run before it counts as failed."""
_POLL_SECONDS = 0.2


class _Worker:
    def __init__(
        self, folder: Path, number: int, shares: Sequence[Share], failures: Mapping[str, int], only: Collection[str] | None
    ):
        logs = folder / "logs"
        with contextlib.ExitStack() as stack:
            output = None
            if len(shares) > 1:
                logs.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context((logs / f"{platform.node()}-{number}.log").open("ab"))
            self.number = number
            self.process = subprocess.Popen(
                [*LAUNCH, "sweep", str(folder)],
                env={**os.environ, **shares[number].variables, WORKER: "1"},
                stdin=subprocess.PIPE,
                text=True,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C reaches it through this process only
            )
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as told:
            names = None if only is None else sorted(only)
            json.dump({"number": number, "count": len(shares), "failures": failures, "only": names}, told)
        if (cores := shares[number].cores) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(self.process.pid, cores)

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


def run_workers(folder: Path, sweep: Sweep, shares: Sequence[Share], only: Collection[str] | None = None) -> int:
    """Until no run is left that nobody has; the exit status of the sweep.

    Args:
        only: names of the runs that are trained; None for all, those too that another command adds meanwhile.
    """
    deaths: collections.Counter[str] = collections.Counter()
    statuses: list[int] = []
    failures = claims.failures(folder, sweep.runs)
    news = News(folder, sweep.planned, only) if len(shares) > 1 else None
    with Signals() as signals:
        workers = [_Worker(folder, number, shares, failures, only) for number in range(len(shares))]
        try:
            while workers:
                signals.children = workers
                time.sleep(_POLL_SECONDS)
                if news is not None:
                    news.look()
                for worker in list(workers):
                    status = worker.process.poll()
                    if signals.killed:
                        return FAILED
                    if status is None:
                        continue
                    workers.remove(worker)
                    if status in (DONE, FAILED, BAD_INPUT, STOPPED) or signals.asked:
                        statuses.append(status if status in (DONE, FAILED, BAD_INPUT) else STOPPED)
                    elif _outlived(folder, sweep, worker, deaths):
                        workers.append(_Worker(folder, worker.number, shares, failures, only))
                    else:
                        statuses.append(FAILED)
            if news is not None:
                news.look(final=True)
        finally:
            for worker in workers:
                worker.send(signal.SIGKILL)
                worker.process.wait()
    return next(status for status in (BAD_INPUT, STOPPED, FAILED, DONE) if status in statuses)


def _outlived(folder: Path, sweep: Sweep, worker: _Worker, deaths: collections.Counter[str]) -> bool:
    """Whether a worker is to follow one that died: it had a run, which goes on, or has failed where that has killed several."""
    status = worker.process.returncode
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    run = next((run for run in read(folder).runs if _had(folder, run, worker.process.pid)), None)
    if run is None:
        log.error("worker %d %s before it had a run", worker.number, how)
        return False
    deaths[run.name] += 1
    log.warning("worker %d %s in %s; another one takes its place", worker.number, how, run.name)
    if deaths[run.name] >= MOST_DEATHS:
        with contextlib.suppress(FolderInUse), owned(claims.claim(folder, run)):
            claims.write_outcome(folder, run, claims.failed(folder, run, f"its worker {how}, {deaths[run.name]} times"))
    return True


def _had(folder: Path, run: Run, pid: int) -> bool:
    record = claims.last_owner(claims.claim(folder, run))
    return record is not None and record.dead is True and record.pid == pid and not record.left
