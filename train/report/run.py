"""A run folder as the report sees it: what was configured, what was measured, and what is missing."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from plait.configs.files import read_json
from plait.train.probes.base import chosen, statistics
from plait.train.probes.statistic import Panel, Statistic
from plait.train.run_folder.lines import EVENTS, METRICS, read_events, read_lines, read_metrics, series
from plait.train.run_folder.probe_files import ATTENTION, ProbeSeries, probe_files, read_npz, read_probes, step_of
from plait.train.terminal.progress import format_seconds

KINDS = ("full", "window", "sparse", "linear", "parallel")
"""Kinds of layers in the order in which they are told of."""
MOST_PROBES = 400
"""Probe steps of a run that are drawn; a panel has no more pixels for them."""


@dataclass(frozen=True)
class Attention:
    """Attention pictures of one held-out text: maps [L, H, T, T], NaN for heads a layer does not have; its T tokens."""

    maps: np.ndarray
    tokens: list[str]
    step: int | None


@dataclass(frozen=True)
class Run:
    """One run folder, read once."""

    path: Path
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    records: list[dict[str, float]]
    events: list[dict[str, Any]]
    probes: ProbeSeries
    attention: Attention | None
    notes: list[str]
    """Sentences about what is missing or was ignored."""
    beside: Mapping[str, Statistic] = field(default_factory=dict)
    """Statistics of the run that no probe declares, by name."""
    place: int = 0
    """Number of its variant among the runs of the page, which its colour follows."""
    repeats: int = 1
    """How many runs that variant has."""

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of the metrics lines that carry `name`."""
        return series(self.records, name)

    def last(self, name: str) -> float:
        """The last finite value of a metric, NaN where there is none."""
        values = self.series(name)[1]
        values = values[np.isfinite(values)]
        return float(values[-1]) if values.size else math.nan

    def by_head(self, name: str) -> np.ndarray | None:
        """Values `[N, L, H]` of a statistic over the N probe steps (its first entries, one head where it is of layers); None where no
        layer has a value."""
        array = self.probes.arrays.get(name)
        if array is None or not np.isfinite(array).any():
            return None
        return self.statistics[name].by_head(array)

    def sources(self, count: int) -> list[str]:
        """The names of a mixture's `count` sources, in the order of arrays by source; numbers where the config does not tell them."""
        named = lookup(self.config, "data.sources")
        return list(named) if isinstance(named, Mapping) and len(named) == count else [f"source {i + 1}" for i in range(count)]

    @functools.cached_property
    def statistics(self) -> dict[str, Statistic]:
        """By name what the probes declare and what is beside, then what the run holds of probes that are gone."""
        declared = {**statistics(), **self.beside}
        return {**declared, **{name: undeclared(name, a) for name, a in self.probes.arrays.items() if name not in declared}}

    def events_of(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind in the order of their steps."""
        return sorted((event for event in self.events if event["kind"] == kind), key=lambda event: event["step"])

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The entries of `probes/layers.json`."""
        return self.probes.layers

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The heads by the kind of their layer, and in layers that have both by their own, in the order of `KINDS`."""
        most = max((layer["num_heads"] for layer in self.layers), default=0)
        heads = np.array([[*layer["head_kinds"], *[None] * most][:most] for layer in self.layers])
        of_layer = np.array([layer["kind"] for layer in self.layers])
        found = []
        for kind in sorted(dict.fromkeys(of_layer.tolist()), key=lambda kind: KINDS.index(kind) if kind in KINDS else len(KINDS)):
            parts = {of: (of_layer == kind)[:, None] & (heads == of) for of in ("attention", "state")}
            there = [of for of, part in parts.items() if part.any()]
            words = f"{kind} layers" if len(there) == 1 else kind + " layers' {} heads"
            found += [Group(kind, of == "state", words.format(of), parts[of]) for of in there]
        return found

    def by_group(self, name: str) -> dict[Group, np.ndarray]:
        """`by_head` of each group that has a value, NaN at all other heads; what is of layers is in one group without words."""
        values = self.by_head(name)
        if values is None:
            return {}
        if self.statistics[name].per == "layer":
            return {Group("", False, "", np.ones(values.shape[1:], bool)): values}
        return {group: part for group in self.groups if np.isfinite(part := group.of(values)).any()}


@dataclass(frozen=True, eq=False)
class Group:
    """Heads of one kind in layers of one kind."""

    kind: str
    """Of the layers."""
    state: bool
    """Whether the heads read a state."""
    words: str
    heads: np.ndarray
    """bool `[L, H]`: which they are."""

    def of(self, values: np.ndarray) -> np.ndarray:
        """Values `[N, L, H]`, NaN at other heads."""
        return np.where(self.heads[:, : values.shape[2]], values[:, :, : self.heads.shape[1]], np.nan)


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in the order given, each named by its folder and as much of the path above as tells them apart."""
    resolved = [Path(path).resolve() for path in paths]
    if not resolved:
        raise ValueError("runs is empty; name at least one run folder")
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(set(resolved)):
        depth += 1
    return [load_run(path, "/".join(path.parts[-depth:])) for path in dict.fromkeys(resolved)]


def load_run(path: Path, name: str) -> Run:
    """Everything the report needs from one run folder.

    Raises:
      ValueError: the folder holds no `metrics.jsonl`.
    """
    if not (path / METRICS).is_file():
        raise ValueError(no_run(path))
    notes = [note for name_ in (METRICS, EVENTS) if (note := read_lines(path / name_)[1])]
    config, environment = (_read_tree(path / f"{file}.json", notes) for file in ("config", "environment"))
    events = read_events(path)
    files = probe_files(path)
    shown = _spread(files, {event["step"] for event in events})
    probes = _with_layers(read_probes(path, shown))
    notes += probes.notes
    if len(shown) < len(files):
        notes.append(f"{len(shown)} of {len(files):,} probe steps are drawn, evenly spread, those of events first")
    if not (path / EVENTS).exists():
        events = derived_events(probes)
        notes.append(f"{EVENTS} is missing; the events shown were derived from the probe files")
    attention = _read_attention(path / ATTENTION, notes)
    return Run(path, name, config, environment, read_metrics(path), events, probes, attention, notes)


def no_run(path: Path) -> str:
    """What is said of a path that is no run folder."""
    why = "is not a run" if path.is_dir() else "is no folder" if path.exists() else "does not exist, so it is not a run"
    return f"{path} {why}: a run folder holds {METRICS}; give the folder that was passed to train as --out"


def _spread(files: Sequence[Path], telling: Set[int]) -> list[Path]:
    """At most `MOST_PROBES` of the files of probe steps: the first, the last, and of each even part between them one of a telling step,
    its last where it has none."""
    if len(files) <= MOST_PROBES:
        return list(files)
    edges = np.linspace(1, len(files) - 1, MOST_PROBES - 1).astype(int)
    parts = [files[start:end] for start, end in pairwise(edges)]
    picked = [next((path for path in part if step_of(path) in telling), part[-1]) for part in parts]
    return [files[0], *picked, files[-1]]


def _read_tree(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        tree = read_json(path)
    except (OSError, ValueError):
        tree = None
    if not isinstance(tree, dict):
        notes.append(f"{path.name} is missing or cannot be read")
        return {}
    return tree


def _read_attention(path: Path, notes: list[str]) -> Attention | None:
    if not path.exists():
        return None
    try:
        arrays = read_npz(path)
        maps, tokens, step = (arrays.get(name) for name in ("maps", "tokens", "step"))
        if maps is None or tokens is None or maps.dtype.kind != "f" or maps.ndim != 4 or maps.shape[2:] != (tokens.size,) * 2:
            raise ValueError(f"{path.name} does not hold pictures")
        if step is not None and (step.ndim or step.dtype.kind not in "iu"):
            raise ValueError(f"{path.name} has no whole number as its step")
    except ValueError as error:
        notes.append(f"{error} and was ignored")
        return None
    return Attention(maps.astype(np.float32), [str(token) for token in tokens.ravel()], None if step is None else int(step))


def _with_layers(probes: ProbeSeries) -> ProbeSeries:
    """The probes with an entry for every layer, "unknown" where `layers.json` has none."""
    shape = next((array.shape for array in probes.arrays.values() if array.ndim >= 3), (0, 0, 0))
    unknown = {"mixer": "unknown", "kind": "unknown", "num_heads": shape[2], "head_kinds": ["attention"] * shape[2]}
    rest = [{"index": i, **unknown} for i in range(len(probes.layers), shape[1])]
    return ProbeSeries(probes.steps, probes.arrays, [*probes.layers, *rest], probes.first_k, probes.notes)


def undeclared(name: str, values: np.ndarray) -> Statistic:
    """What arrays `[N, L, ...]` tell of a statistic whose probe is gone."""
    entries = {"size": lambda config: values.shape[3]} if values.ndim > 3 else {}
    panel = Panel(title=name, section="Of other probes", lines=True)
    per = "layer" if values.ndim == 2 else "head"
    return Statistic(name=name, per=per, unit="", meaning="as a probe measured that is not here", panel=panel, **entries)


def derived_events(probes: ProbeSeries) -> list[dict[str, Any]]:
    """What the probes' own thresholds say of their numbers."""
    watchers = [watcher for probe in chosen() for watcher in probe.watchers(probes.layers)]
    events = []
    for index, step in enumerate(probes.steps):
        values = {name: array[index] for name, array in probes.arrays.items()}
        events += [event.to_dict() for watcher in watchers for event in watcher.update(int(step), values)]
    return events


def lookup(tree: Mapping[str, Any], *names: str) -> Any:
    """The first value found in a JSON tree under one of the dotted names, None where there is none."""
    for name in names:
        value: Any = tree
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A JSON tree as one level of dotted names."""
    if isinstance(tree, Mapping):
        return {name: leaf for key, item in tree.items() for name, leaf in flatten(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): tree}


def quantity(value: Any, unit: str = "") -> str:
    """A count with a readable scale: 950, 12.3k, 65.5M, 1.20B; a dash when it is not known."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return "–"
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{letter}{unit}"
    return f"{value:.4g}{unit}"


def number(value: float, digits: int = 3) -> str:
    """A value with fixed decimals, a dash when it is not known."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def final_loss(run: Run) -> float:
    """The mean of the last 2% of the finite training losses, NaN where there is none."""
    values = run.series("loss/train")[1]
    values = values[np.isfinite(values)]
    return float(values[-max(1, len(values) // 50) :].mean()) if values.size else math.nan


def tokens_per_second(run: Run) -> float:
    """The median of what was logged, NaN where nothing was."""
    speed = run.series("throughput/tokens_per_second")[1]
    speed = speed[np.isfinite(speed)]
    return float(np.median(speed)) if speed.size else math.nan


def facts(run: Run) -> dict[str, str]:
    """What the header and the comparison say of a run; a dash where the run folder does not tell."""
    both = {**run.environment, **run.config}
    devices = lookup(run.environment, "devices")
    if isinstance(devices, dict):
        count, kind = devices.get("count", 1), devices.get("kind", "?")
        devices = f"{count} × {kind}" if isinstance(count, int) and count > 1 else kind
    speed = tokens_per_second(run)
    mfu = run.last("throughput/mfu")
    last = run.records[-1] if run.records else {}
    commit = lookup(run.environment, "commit")
    return {
        "preset": str(lookup(both, "name") or "–"),
        "pattern": str(lookup(both, "model.pattern") or "–"),
        "parameters": quantity(lookup(both, "num_params")),
        "device": str(devices or "–"),
        "steps": f"{int(last['step']):,}" if last else "–",
        "tokens": quantity(last.get("tokens", math.nan)),
        "wall time": format_seconds(last.get("seconds", math.nan)),
        "train loss": number(final_loss(run)),
        "validation loss": number(run.last("loss/val")),
        "bits per byte": number(run.last("loss/bits_per_byte")),
        "speed": quantity(speed, " tok/s"),
        "MFU": f"{mfu:.1%}" if math.isfinite(mfu) else "–",
        "commit": str(commit or "–")[:10],
    }
