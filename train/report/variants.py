"""Runs that differ in seeds alone are one variant: one colour, one mean, and what the seeds differ by."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile

import numpy as np

from plait.train.report.run import Run, flatten, lookup
from plait.train.scoring.extent import words as extent
from plait.train.sweep.arms import SEEDS, Estimate
from plait.train.sweep.verdict import Entry, apart
from plait.train.sweep.verdict import verdict as told

PLACES = ("out", "resume", "data.cache_dir")
"""Settings that say where a run lies and not what it is."""
_OF_SWEEP = r"-[0-9a-f]{10}$"
_SEED_PART = r"(?:(?<=/)|(?<=,)|^)(?:data\.)?seed=[0-9]+(?=,|$)"


@dataclasses.dataclass(frozen=True)
class Variant:
    """Runs that differ in seeds alone."""

    name: str
    runs: tuple[Run, ...]

    def ends(self, metric: str) -> dict[str, float]:
        """The last finite values of a metric, by seeds."""
        found = {seeds(run): run.last(metric) for run in self.runs}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def mean(self, metric: str) -> float:
        """Over the runs that have the metric, NaN where none has."""
        ends = list(self.ends(metric).values())
        return float(np.mean(ends)) if ends else math.nan


def settings(run: Run) -> dict[str, str]:
    """What was configured by dotted key, without seeds and places."""
    return {key: str(value) for key, value in flatten(run.config).items() if key not in (*SEEDS, *PLACES)}


def seeds(run: Run) -> str:
    """What tells a run from the others of its variant."""
    config = flatten(run.config)
    return ", ".join(str(config.get(key, "–")) for key in SEEDS)


def by_variant(runs: Sequence[Run]) -> list[Run]:
    """The runs in the same order, each with the number of its variant and how many runs that has. A run without a config is one by itself,
    and so is one with the seeds of another."""
    keys: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for index, run in enumerate(runs):
        told = tuple(sorted(settings(run).items())) or (("", str(index)),)
        taken = {seeds(runs[other]) for other in keys.get(told, ())}
        keys.setdefault((*told, ("", str(index))) if seeds(run) in taken else told, []).append(index)
    places = {index: (place, len(group)) for place, group in enumerate(keys.values()) for index in group}
    return [dataclasses.replace(run, place=places[index][0], repeats=places[index][1]) for index, run in enumerate(runs)]


def variants(runs: Sequence[Run]) -> list[Variant]:
    """Those of runs that know theirs, by number."""
    found: dict[int, list[Run]] = {}
    for run in runs:
        found.setdefault(run.place, []).append(run)
    return [Variant(_name(found[place]), tuple(found[place])) for place in sorted(found)]


def whose(run: Run, runs: Sequence[Run]) -> str:
    """A run in a sentence: its name, or which seed it is of its variant."""
    if run.repeats < 2:
        return run.name
    config = flatten(run.config)
    values = list(dict.fromkeys(str(config.get(key, "–")) for key in SEEDS))
    own = [one for one in runs if one.place == run.place]
    return f"seed{'s' * (len(values) > 1)} {' and '.join(values)} of {_common(own) if len(own) > 1 else run.name}"


def _name(runs: Sequence[Run]) -> str:
    return runs[0].name if len(runs) == 1 else f"{_common(runs)} ({len(runs)} seeds)"


def _common(runs: Sequence[Run]) -> str:
    """What the names of runs share beside their seeds: of runs of a sweep, what sets their arm apart."""
    if all(re.search(_OF_SWEEP, run.name) for run in runs):
        plain = {
            re.sub(",{2,}", ",", re.sub(_SEED_PART, "", re.sub(_OF_SWEEP, "", run.name))).replace("/,", "/").strip(",")
            for run in runs
        }
        if len(plain) == 1:
            name = plain.pop()
            return name if name and not name.endswith("/") else f"{name}as the preset"
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*(run.name for run in runs)))
    common = "".join(letters[0] for letters in same).rstrip("-_/., =0123456789")
    common = common.removesuffix("seed").removesuffix("data.").rstrip("-_/., ")
    return common or runs[0].name


def differing(found: Sequence[Variant]) -> dict[str, list[str]]:
    """By dotted key, the settings in which the variants differ, of each. Options of a component that not all have follow from the key
    that chose it, and are left out where any other key differs."""
    told = [settings(variant.runs[0]) for variant in found]
    names = dict.fromkeys(name for one in told for name in one)
    rows = {name: [one.get(name, "–") for one in told] for name in names}
    rows = {name: row for name, row in rows.items() if len(set(row)) > 1}
    return {name: row for name, row in rows.items() if "–" not in row} or rows


def difference(one: Variant, other: Variant, metric: str) -> Estimate:
    """Of the means, `one` less `other`: over the seeds that both have where these are two or more, else with an unknown interval."""
    return apart(Entry(one.name, one.ends(metric)), Entry(other.name, other.ends(metric)))


def verdict(found: Sequence[Variant], metric: str, words: str) -> str | None:
    """Which variant ends lowest, and whether that is more than noise; None where fewer than two have the metric."""
    return told([Entry(one.name, one.ends(metric)) for one in found], words)


def by_runs(found: Sequence[Variant], values: Mapping[str, str]) -> list[str]:
    """Values of runs by name as one of each variant: those that differ beside each other."""
    return [", ".join(dict.fromkeys(values[run.name] for run in variant.runs)) for variant in found]


def validated(found: Sequence[Variant]) -> str:
    """On how much variants were validated, empty where no run tells it, and whether their seeds hold out other text."""
    by_extent: dict[str, list[str]] = {}
    for one in found:
        for text in dict.fromkeys(text for run in one.runs if (text := extent(run.environment))):
            by_extent.setdefault(text, []).append(one.name)
    told = "; ".join(text if len(by_extent) == 1 else f"{', '.join(names)} on {text}" for text, names in by_extent.items())
    told = f"Measured {'on ' if len(by_extent) == 1 else ''}{told}." if told else ""
    configs = [flatten(run.config) for one in found for run in one.runs if lookup(run.environment, "data.corpus") is not None]
    own = [one for one in configs if one.get("data.split_seed") is None and one.get("data.val_fraction")]
    texts = {one.get("data.seed") for one in own}
    if len(texts) > 1:
        told += " Which text is held out differs between seeds: data.seed decides it where data.split_seed is not given."
    return told.strip()
