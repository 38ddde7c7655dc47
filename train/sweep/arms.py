"""The results of a sweep by arm: runs that differ in seeds alone are one, with a mean, an interval and its distance from a baseline."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from plait.configs import codec
from plait.train.sweep.record import Sweep
from plait.train.sweep.runs import Run, SweepError
from plait.train.sweep.table import follows, together, varying
from plait.train.sweep.workers import claims

SEEDS = ("seed", "data.seed")
RATE = "optimizer.learning_rate"
LEVEL = 0.95
"""Of the confidence intervals."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds; `half` is half its t interval, NaN for a single seed."""

    mean: float
    half: float
    count: int


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs that differ in seeds alone."""

    keys: Mapping[str, Any]
    runs: Mapping[tuple[Any, ...], Run]
    """By seeds."""
    values: Mapping[tuple[Any, ...], float]
    """The metric by seeds, of the runs that are over and have it as a finite number."""

    @property
    def estimate(self) -> Estimate:
        return estimate(self.values.values())


def estimate(values: Any) -> Estimate:
    """The mean of independent values, and half its confidence interval by Student's t."""
    found = np.asarray(list(values), float)
    if found.size < 2:
        return Estimate(float(found[0]) if found.size else math.nan, math.nan, found.size)
    half = stats.t.ppf((1 + LEVEL) / 2, found.size - 1) * found.std(ddof=1) / math.sqrt(found.size)
    return Estimate(float(found.mean()), float(half), found.size)


def difference(arm: Arm, baseline: Arm) -> Estimate:
    """`arm` less `baseline`, over the seeds that both have."""
    return estimate(arm.values[seeds] - baseline.values[seeds] for seeds in arm.values if seeds in baseline.values)


def arms(folder: Path, sweep: Sweep, first: Sequence[str], metric: str, also: Sequence[str] = ()) -> list[Arm]:
    """All arms, by the keys that vary: those of `first`, then the learning rate, those of `also`, the others. A key that varies only
    together with one before it is left out unless it is named, as the width of a layer that follows the width of a model; so is one that
    some runs have not at all and that follows from one before it, as an option of a mixer from the pattern.

    Raises:
        SweepError: no run is over, no run has the metric, or a named key does not vary.
    """
    varied = varying(sweep.runs)
    known = [key for key in next(iter(varied.values())) if key not in SEEDS]
    named = (*first, *also)
    for key in named:
        if key in SEEDS:
            raise SweepError(f"{key!r} is a seed, and runs that differ in seeds alone are one arm; give another key")
        if key not in known:
            raise SweepError(f"{key!r} does not vary in this sweep{_near(key, known)}")
    keys: list[str] = []
    for key in dict.fromkeys([*first, *(key for key in known if key == RATE), *also, *known]):
        if key in named or not any(together(key, before, varied) or follows(key, before, varied) for before in keys):
            keys.append(key)
    ended = {run.name: claims.outcome(folder, run) for run in sweep.runs}
    over = {name: one.metrics for name, one in ended.items() if one is not None and one.status in claims.ENDED}
    if not over:
        raise SweepError(f"{str(folder)!r} has no run that is over with a result; see 'launch.py sweep {folder} --status'")
    names = {name for metrics in over.values() for name in metrics}
    if metric not in names:
        raise SweepError(f"metric={metric!r} is of no run that is over{_near(metric, sorted(names))}")
    grouped: dict[tuple[str, ...], list[Run]] = {}
    for run in sweep.runs:
        grouped.setdefault(tuple(repr(varied[run.name][key]) for key in keys), []).append(run)
    found = []
    for runs in grouped.values():
        by_seed = {seeds_of(run): run for run in runs}
        values = {seeds: over.get(run.name, {}).get(metric) for seeds, run in by_seed.items()}
        finite = {seeds: float(value) for seeds, value in values.items() if value is not None and math.isfinite(value)}
        found.append(Arm({key: varied[runs[0].name][key] for key in keys}, by_seed, finite))
    return found


def baselines(found: Sequence[Arm], wanted: str) -> list[Arm | None]:
    """For each arm the one that has the wanted KEY=VALUE, of a key of the arms, and is otherwise the same.

    Raises:
        SweepError: no arm has it.
    """
    key, _, value = wanted.partition("=")
    there = list(dict.fromkeys(str(arm.keys[key]) for arm in found))
    if not any(_is(arm.keys[key], value) for arm in found):
        raise SweepError(f"baseline={wanted!r}: {key} is never {value!r}; it is {', '.join(there)}")
    others = lambda arm: {name: one for name, one in arm.keys.items() if name != key}
    of = [arm for arm in found if _is(arm.keys[key], value)]
    return [next((one for one in of if others(one) == others(arm)), None) for arm in found]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Learning-rate sensitivity (2309.14322, section 2.3) of the arms that differ in the learning rate alone."""

    keys: Mapping[str, Any]
    over_seeds: Estimate
    """Of the seeds that have every learning rate."""
    rates: int
    start: float
    """The loss that stands for runs that diverged or end above it: the mean of the first that were logged."""


def sensitivities(folder: Path, found: Sequence[Arm]) -> list[Sensitivity]:
    """By the values of the other keys: the mean over learning rates of min(loss, loss at the start), less the best loss."""
    grouped: dict[tuple[str, ...], list[Arm]] = {}
    for arm in found:
        grouped.setdefault(tuple(repr(value) for key, value in arm.keys.items() if key != RATE), []).append(arm)
    result = []
    for group in grouped.values():
        start = _start(folder, [run for arm in group for run in arm.runs.values()])
        ends = [{**{one: start for one, run in arm.runs.items() if _diverged(folder, run)}, **arm.values} for arm in group]
        whole = [seeds for seeds in ends[0] if all(seeds in of for of in ends)]
        each = [np.array([min(of[seeds], start) for of in ends]) for seeds in whole] if math.isfinite(start) else []
        others = {key: value for key, value in group[0].keys.items() if key != RATE}
        result.append(Sensitivity(others, estimate(values.mean() - values.min() for values in each), len(group), start))
    return result


def _start(folder: Path, runs: Sequence[Run]) -> float:
    firsts = []
    for run in runs:
        series = (value for _, value in claims.logged(folder, run, "loss/train") if value is not None)
        firsts += [value for value in [next(series, None)] if value is not None]
    return float(np.mean(firsts)) if firsts else math.nan


def _diverged(folder: Path, run: Run) -> bool:
    """Whether the run has ended, and its last training loss was no number."""
    ended = claims.outcome(folder, run)
    return ended is not None and claims.latest(folder, run).get("loss/train", 0.0) is None


def seeds_of(run: Run) -> tuple[Any, ...]:
    """What runs that are compared in pairs have alike."""
    leaves = codec.leaves(codec.encode(run.config))
    return tuple(leaves[key] for key in SEEDS)


def _is(value: Any, text: str) -> bool:
    try:
        return not isinstance(value, bool) and float(value) == float(text)
    except (TypeError, ValueError):
        return str(value) == text


def _near(name: str, known: Sequence[str]) -> str:
    """The name that was meant: one that has the same parts in another order, or ends so; else the nearest by letters, else all."""
    parts = lambda text: {part for part in re.split(r"[^a-z0-9]+", text.lower()) if part}
    asked = parts(name)
    near = [one for one in known if parts(one) == asked] or [one for one in known if one.endswith((f".{name}", f"/{name}"))]
    near = near or difflib.get_close_matches(name, known, n=1)
    near = near or sorted((one for one in known if asked and asked <= parts(one)), key=len)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known) or 'none'}"
