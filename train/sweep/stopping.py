"""Early stopping: whether a run goes on, from what it and others had reached at the steps that are compared.

claims/NAME/compared.json   by step, the run's value and, where it was ended there, why

Every worker writes this for its own run and reads that of all others, so that nobody else decides. What was decided stays decided: a run that
was killed after a comparison is not compared there again.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from plait.configs import codec
from plait.configs.components import ConfigError
from plait.configs.files import write_atomically
from plait.configs.sweeps.stopping import StopConfig
from plait.train.sweep.arms import seeds_of
from plait.train.sweep.better import better
from plait.train.sweep.record import Sweep, read
from plait.train.sweep.runs import Run
from plait.train.sweep.workers import claims

COMPARED = "compared.json"


def past_median(own: Sequence[float], others: Sequence[Sequence[float]], least: int) -> float | None:
    """The median that the best of a run's values, of which less is better, is worse than; None where it goes on.

    Args:
        own: values of the run at the steps compared so far.
        others: those of each run that is done, up to the same step.
        least: runs that must be done.
    """
    means = [statistics.fmean(one) for one in others if one]
    if len(means) < least:
        return None
    median = statistics.median(means)
    return median if min(own) > median else None


def past_best(own: float, others: Sequence[float], factor: int) -> float | None:
    """The value that a run had to reach to be among the best in `factor` of those at this step, itself among them; None where it does.

    Less is better. At least one goes on, so that the first to come always does.
    """
    ranked = sorted((*others, own))
    bar = ranked[max(1, len(ranked) // factor) - 1]
    return bar if own > bar else None


class Judge:
    """Of one run, while its worker trains it."""

    def __init__(self, folder: Path, sweep: Sweep, run: Run):
        self.folder, self.run, self.stop = folder, run, sweep.stop
        self.steps = frozenset(self.stop.compared(run.config.steps))
        self._sweep = sweep
        self._sign = 1.0 if (self.stop.better or better(self.stop.metric)) == "lower" else -1.0

    @property
    def told(self) -> str | None:
        """Why the run was ended, where it was, though its worker may not have come to say so."""
        return next((why for _, why in _read(self.folder, self.run).values() if why is not None), None)

    def __call__(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Why the run ends at a compared step; None where it goes on.

        Raises:
            ConfigError: the run does not tell the metric.
        """
        mine = _read(self.folder, self.run)
        if step in mine:
            return mine[step][1]
        if self.stop.metric not in metrics:
            there = ", ".join(sorted(name for name in metrics if name.startswith(("loss/", "task/"))))
            raise ConfigError(f"stop.metric={self.stop.metric!r} is not told by this run at step {step}; it tells {there}")
        value = metrics[self.stop.metric]
        mine[step] = (value if math.isfinite(value) else None, None)
        if (why := self._why(step, mine)) is not None:
            mine[step] = (mine[step][0], why)
        path = claims.claim(self.folder, self.run) / COMPARED
        write_atomically(path, json.dumps({str(at): one for at, one in sorted(mine.items())}) + "\n")
        return why

    def _others(self) -> list[Run]:
        sweep = self._sweep if self._sweep.search is None else read(self.folder)  # with what was proposed meanwhile
        return [one for one in sweep.runs if seeds_of(one) == seeds_of(self.run) and one.name != self.run.name]

    def _why(self, step: int, mine: _Compared) -> str | None:
        where = f"at step {step:,}: {self.stop.metric} {_shown(mine[step][0])}"
        if self.stop.rule == "median":
            done = [one for one in self._others() if (found := claims.outcome(self.folder, one)) and found.status == "done"]
            others = [self._values(_read(self.folder, one), step) for one in done]
            bar = past_median(self._values(mine, step), others, self.stop.least)
            return (
                None
                if bar is None
                else f"{where}, its best so far worse than {_shown(self._sign * bar)}, the median of {len(done)}"
            )
        there = [self._values({step: had[step]}, step)[0] for one in self._others() if step in (had := _read(self.folder, one))]
        bar = past_best(self._values({step: mine[step]}, step)[0], there, self.stop.factor)
        if bar is None:
            return None
        kept = max(1, (len(there) + 1) // self.stop.factor)
        return f"{where}, not among the best {kept} of {len(there) + 1}, which have {_shown(self._sign * bar)} or better"

    def _values(self, found: _Compared, last: int) -> list[float]:
        """Up to a step, less being better; what was no number is worst."""
        return [math.inf if value is None else self._sign * value for at, (value, _) in sorted(found.items()) if at <= last]


_Compared = dict[int, tuple[float | None, str | None]]
"""By step, the value, None where it was no number, and why the run ended there."""


def check(stop: StopConfig, runs: Sequence[Run]) -> None:
    """Raises ConfigError where a run cannot be compared as asked, with its overrides."""
    for run in runs:
        try:
            stop.check_run(run.config)
        except ValueError as error:
            raise ConfigError(f"{run.name}: {error}") from None


def _read(folder: Path, run: Run) -> _Compared:
    path = claims.claim(folder, run) / COMPARED
    if not path.exists():
        return {}
    return {int(step): one for step, one in codec.load(dict[str, tuple[float | None, str | None]], path).items()}


def _shown(value: float | None) -> str:
    return "no number" if value is None or math.isinf(value) else f"{value:.4g}"
