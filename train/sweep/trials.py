"""Trials of a search, in the folder that workers share: whoever has no run left proposes the next, from what all before have come to.

trials/owner/          who proposes (`plait.train.run_folder.owner`), one at a time
trials/00000.json      the values of a trial, and its runs, one a seed

There is no server and no database: the sampler is made anew for each proposal, and told of all trials.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.configs import codec
from plait.configs.files import write_atomically
from plait.configs.sweeps.rows import Rows, product, seeds
from plait.configs.sweeps.search import Between, Choice, Dimension, SearchConfig, Space, placed, probes
from plait.train.run_folder.owner import FolderInUse, owned
from plait.train.sweep.better import better
from plait.train.sweep.runs import Run, SweepError, resolved
from plait.train.sweep.workers import claims

TRIALS = "trials"
_DIGITS = 4  # of a proposed number that are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What is searched, as `sweep.json` keeps it."""

    options: SearchConfig
    preset: str
    seeds: int | None
    fixed: Mapping[str, Any]
    """Overrides that all trials have."""
    space: Mapping[str, Between | Choice]

    @property
    def first(self) -> Mapping[str, Any]:
        """Values that can be used."""
        return {key: one.ends[0] for key, one in self.space.items()}

    def rows(self, values: Mapping[str, Any]) -> Rows:
        """The rows of a trial, one a seed."""
        row = (placed({**self.fixed, **values}),)
        return row if self.seeds is None else product(row, seeds(self.seeds))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A proposal and its runs."""

    number: int
    values: Mapping[str, Any]
    runs: tuple[Run, ...]
    error: str | None = None
    """Why it has none: these values cannot be used together."""


def searched(options: SearchConfig, preset: str, count: int | None, space: Space) -> Search:
    """A search that can be begun.

    Raises:
        SweepError: optuna is missing, nothing is to be searched, or ends of dimensions cannot be used: all of them named.
    """
    need_optuna(options)
    dimensions = {key: one for key, one in space.items() if isinstance(one, Dimension)}
    if not dimensions:
        raise SweepError(
            f"search.sampler={options.sampler!r} has nothing to search; give a key several values or a range, "
            "as in --optimizer.learning-rate 1e-4..1e-1:log"
        )
    fixed = {key: one for key, one in space.items() if key not in dimensions}
    found = Search(options=options, preset=preset, seeds=count, fixed=fixed, space=dimensions)
    resolved(preset, tuple(probes(space)))
    return found


def need_optuna(options: SearchConfig) -> None:
    """Raises SweepError where the extra is missing."""
    if importlib.util.find_spec("optuna") is None:
        raise SweepError(
            f"search.sampler={options.sampler!r} needs the package optuna, which is not installed; pip install 'plait[search]'"
        )


def trials(folder: Path) -> list[Trial]:
    """Those that were proposed, in order."""
    return [codec.load(Trial, path) for path in sorted((folder / TRIALS).glob("[0-9]*.json"))]


def propose(folder: Path, search: Search, beside: Sequence[Run] = ()) -> bool:
    """Whether there is a further trial now; waits for whoever else proposes one.

    Args:
        beside: runs that are no trial's; one that a trial asks for too is trained once.

    Raises:
        SweepError: optuna is missing here.
    """
    need_optuna(search.options)
    while True:
        try:
            with owned(folder / TRIALS) as check:
                there = trials(folder)
                if len(there) >= search.options.trials:
                    return False
                found = _proposed(folder, search, there, beside)
                check()
                path = folder / TRIALS / f"{found.number:05}.json"
                write_atomically(path, json.dumps(codec.encode(found), indent=1) + "\n")
                return True
        except FolderInUse:
            time.sleep(0.2)


def value(folder: Path, trial: Trial, metric: str) -> float | None:
    """What a trial is judged by: the mean over its seeds, once all have ended; None before, and where one has none."""
    ended = [claims.outcome(folder, run) for run in trial.runs]
    found = [one.metrics.get(metric) for one in ended if one is not None and one.status in claims.ENDED]
    if not ended or len(found) < len(ended) or any(one is None or not math.isfinite(one) for one in found):
        return None
    return statistics.fmean(one for one in found if one is not None)


def _proposed(folder: Path, search: Search, there: list[Trial], beside: Sequence[Run]) -> Trial:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    number, options = len(there), search.options
    lower = (options.better or better(options.metric)) == "lower"
    seed = options.seed + number
    sampler = (
        optuna.samplers.RandomSampler(seed)
        if options.sampler == "random"
        else optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    )
    study = optuna.create_study(sampler=sampler, direction="minimize" if lower else "maximize")
    for trial in there:
        study.add_trial(_told(folder, trial, search.space, options.metric))
    drawn = study.ask({key: _distribution(one) for key, one in search.space.items()}).params
    values = {key: _drawn(one, drawn[key]) for key, one in search.space.items()}
    try:
        runs = resolved(search.preset, search.rows(values))
    except SweepError as error:
        return Trial(number=number, values=values, runs=(), error=str(error))
    known = {run.content: run for run in (*(run for trial in there for run in trial.runs), *beside)}
    new = (dataclasses.replace(run, name=f"trial={number},{run.name}", trial=number) for run in runs)
    return Trial(number=number, values=values, runs=tuple(known.get(run.content, run) for run in new))


def _told(folder: Path, trial: Trial, space: Mapping[str, Between | Choice], metric: str) -> Any:
    """A trial as the sampler takes it: running ones too, near which it then proposes nothing."""
    from optuna.trial import TrialState, create_trial

    params = {
        key: of.values.index(trial.values[key]) if isinstance(of, Choice) else trial.values[key] for key, of in space.items()
    }
    ended = [claims.outcome(folder, run) for run in trial.runs]
    state, told, between = TrialState.RUNNING, value(folder, trial, metric), {}
    if told is not None:
        state = TrialState.COMPLETE
    elif trial.error is not None or any(one is not None and one.status == "failed" for one in ended):
        state = TrialState.FAIL
    elif all(one is not None for one in ended):
        last = [(one.step, number) for one in ended if one and (number := one.metrics.get(metric)) is not None]
        state = TrialState.PRUNED if last and all(math.isfinite(number) for _, number in last) else TrialState.FAIL
        if state is TrialState.PRUNED:
            told = statistics.fmean(number for _, number in last)
            between = {min(step for step, _ in last): told}
    distributions = {key: _distribution(one) for key, one in space.items()}
    return create_trial(state=state, value=told, params=params, distributions=distributions, intermediate_values=between)


def _distribution(dimension: Between | Choice) -> Any:
    """As the sampler has it; choices by their number."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choice):
        return CategoricalDistribution(range(len(dimension.values)))
    if isinstance(dimension.low, int) and isinstance(dimension.high, int):
        return IntDistribution(dimension.low, dimension.high, log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _drawn(dimension: Between | Choice, found: Any) -> Any:
    """What was proposed, in a few digits, as names and tables show it."""
    if isinstance(dimension, Choice):
        return dimension.values[found]
    if isinstance(found, int):
        return found
    return min(max(float(f"{found:.{_DIGITS}g}"), float(dimension.low)), float(dimension.high))
