"""A worker: one process that trains one run after another until none is left to claim."""

from __future__ import annotations

import dataclasses
import gc
import logging
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import jax

from plait.configs.errors import is_bad_input
from plait.configs.experiment import ExperimentConfig
from plait.kernels.dispatch import forget_chosen
from plait.train.loop import train
from plait.train.pods.hosts.failure import TrainingFailed
from plait.train.pods.hosts.supervise import DONE, FAILED, STOPPED
from plait.train.program_cache import is_usual
from plait.train.run_folder.lines import read_events
from plait.train.run_folder.owner import FolderInUse, FolderLost, owned
from plait.train.sweep import table
from plait.train.sweep.record import Sweep, mark, read
from plait.train.sweep.runs import Run
from plait.train.sweep.stopping import Judge
from plait.train.sweep.trials import propose
from plait.train.sweep.workers import claims
from plait.train.sweep.workers.claims import OVER, Outcome
from plait.train.watching.actions import STOPS

log = logging.getLogger("plait")

COMPILED, DATA = "compiled", "data"


def work(
    folder: Path,
    number: int = 0,
    count: int = 1,
    failures: Mapping[str, int] | None = None,
    only: Collection[str] | None = None,
) -> int:
    """Trains runs of the sweep in `folder` that nobody has, and gives the exit status: done, failed where one is (or where the sweep is
    gone from the folder), or stopped by a signal.

    Args:
        number: of this worker among the `count` on this machine, which begin at different runs: neighbours are alike, and the second of
            them finds its program compiled.
        failures: by run, when the command began; None where that is now.
        only: names of the runs that are trained; None for all.
    """
    begun, sweep = mark(folder), read(folder)
    _share_programs(folder)
    worker = _Worker(folder, sweep, begun, claims.failures(folder, sweep.runs) if failures is None else failures, only)
    first = number * len(worker.runs) // count
    for patient in (False, True):  # what others seem to have is watched at the end, which takes its time
        while True:
            runs = worker.runs
            for run in (*runs[first:], *runs[:first]):
                if worker.is_lost():
                    return FAILED
                if worker.is_due(run) and (patient or claims.holder(folder, run) is None) and not worker.take(run):
                    return STOPPED
            if worker.is_lost():
                return FAILED
            more = sweep.search is not None and propose(folder, sweep.search, sweep.runs)
            worker.sweep = read(folder)  # another command may have given it runs
            if not more and len(worker.runs) == len(runs):
                break
    worker.write_table()
    return FAILED if worker.lost or any(claims.status(folder, run) == "failed" for run in worker.runs) else DONE


class _Worker:
    def __init__(
        self,
        folder: Path,
        sweep: Sweep,
        begun: tuple[int, int] | None,
        failures: Mapping[str, int],
        only: Collection[str] | None,
    ):
        self.folder, self.sweep, self._begun, self._only = folder, sweep, begun, only
        self.failures = failures
        """By run: one that has failed since is for the next command."""
        self.lost: set[str] = set()
        """Runs that this worker could not keep track of, as where the disk is full."""
        self._traceback: str | None = None
        """Of the run that is being trained, where nobody knows what its error means."""

    @property
    def runs(self) -> tuple[Run, ...]:
        """Those that it trains, where no other worker does."""
        return tuple(run for run in self.sweep.runs if self._only is None or run.name in self._only)

    def is_lost(self) -> bool:
        """Whether the folder was removed, or another sweep begun there: nothing more may be written."""
        if mark(self.folder) == self._begun:
            return False
        log.error("%s was removed, or begun anew; this worker ends", self.folder)
        return True

    def write_table(self) -> None:
        """The table anew: a worker may have died between an outcome and its line, or the table may have been removed."""
        if self.is_lost():
            return
        try:
            table.write(self.folder, self.sweep)
        except OSError as error:
            log.error(
                "the table of %s cannot be written: %s; it is written by the same command once there is room", self.folder, error
            )

    def is_due(self, run: Run) -> bool:
        """Whether it is not over, and has not failed since."""
        if run.name in self.lost:
            return False
        found = claims.outcome(self.folder, run)
        return found is None or (found.status not in OVER and found.failures == self.failures.get(run.name, 0))

    def take(self, run: Run) -> bool:
        """Trains the run unless another worker has it; False where a signal ended that."""
        try:
            with owned(claims.claim(self.folder, run)) as check:
                if not self.is_due(run):
                    return True
                where = self.sweep.runs.index(run) + 1
                log.info("run %d of %d: %s", where, len(self.sweep.runs), run.name)
                found = self._train(run)
                if found is None:
                    return False
                check()
                claims.write_outcome(self.folder, run, found)
                table.write(self.folder, self.sweep)
                told = found.error or found.why
                if found.error is not None:
                    first = claims.first_with_error(self.folder, self.sweep.runs, run, self.failures)
                    if first.name != run.name:
                        told = f"the same error as run {self.sweep.runs.index(first) + 1}"
                    elif self._traceback is not None:
                        log.error("%s", self._traceback)
                log.info("run %d of %d is %s%s", where, len(self.sweep.runs), found.status, f": {told}" if told else "")
        except (FolderInUse, FolderLost) as error:
            log.info("%s is left to another worker: %s", run.name, error)
        except OSError as error:  # of the claim or the outcome: the run is as it was
            log.error("%s cannot be kept track of: %s", run.name, error)
            self.lost.add(run.name)
        return True

    def _train(self, run: Run) -> Outcome | None:
        """How the run ended; None where a signal stopped it."""
        judge = None if self.sweep.stop.rule is None else Judge(self.folder, self.sweep, run)
        if judge is not None and judge.told is not None:  # by a worker that was killed before it could say so
            return self._ended(run, "pruned", judge.told)
        try:
            result = train(_placed(run.config, self.folder, run), judge)
        except (FolderInUse, FolderLost):
            raise
        except Exception as error:  # of this run alone, whatever it is
            message = f"{type(error).__name__}: {error}"[:2000]
            known = isinstance(error, TrainingFailed | OSError) or (isinstance(error, ValueError) and is_bad_input(error))
            self._traceback = None if known else traceback.format_exc()
            return claims.failed(self.folder, run, message)
        finally:
            forget_chosen()
            jax.clear_caches()
            gc.collect()
        if result.judged is not None:
            return self._ended(run, "pruned", result.judged)
        if not result.finished and not result.by_event:
            return None
        return self._ended(run, "stopped", _event(result.folder, result.step)) if result.by_event else self._ended(run, "done")

    def _ended(self, run: Run, status: Literal["done", "stopped", "pruned"], why: str | None = None) -> Outcome:
        metrics = {name: value for name, value in claims.latest(self.folder, run).items() if "/" in name}
        failures = claims.failures(self.folder, [run])[run.name]
        return Outcome(status=status, why=why, failures=failures, metrics=metrics, **claims.progress(self.folder, run))


def _placed(config: ExperimentConfig, folder: Path, run: Run) -> ExperimentConfig:
    """The run in its folder, going on with what is there, on the tokens that all runs of the sweep share."""
    data = dataclasses.replace(config.data, cache_dir=config.data.cache_dir or str(folder / DATA))
    return dataclasses.replace(config, out=str(claims.run_folder(folder, run)), resume=True, data=data)


def _event(folder: Path, step: int) -> str | None:
    """What the event said that ended a run after `step`."""
    try:
        return next(
            (one["message"] for one in reversed(read_events(folder)) if one["message"].endswith(STOPS.format(step))), None
        )
    except ValueError:
        return None


def _share_programs(folder: Path) -> None:
    """Compiled programs are kept in the sweep's folder, or where JAX_COMPILATION_CACHE_DIR says, so that equal ones compile once."""
    if is_usual() or jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str((folder / COMPILED).absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
