"""The table of a sweep: a line a run, with the keys in which runs differ, how it stands, and its last metrics."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from plait.configs import codec
from plait.configs.files import write_atomically
from plait.train.sweep.record import Sweep
from plait.train.sweep.runs import Run
from plait.train.sweep.workers import claims

CSV, PARQUET = "results.csv", "results.parquet"


def write(folder: Path, sweep: Sweep) -> None:
    """Writes `results.csv` and `results.parquet`, again where a run ended meanwhile: then the table of the last writer holds all."""
    written = None
    while (found := records(folder, sweep)) != written:
        columns = {name: [record.get(name) for record in found] for name in dict.fromkeys(name for one in found for name in one)}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values()))
        write_atomically(folder / CSV, text.getvalue(), durable=False)
        buffer = io.BytesIO()
        pq.write_table(pa.table({name: _column(values) for name, values in columns.items()}), buffer)
        write_atomically(folder / PARQUET, buffer.getvalue(), durable=False)
        written = found


def records(folder: Path, sweep: Sweep) -> list[dict[str, Any]]:
    """The lines; what has no value is None."""
    varied = varying(sweep.runs)
    found = []
    for run in sweep.runs:
        ended = claims.outcome(folder, run)
        state: str = claims.status(folder, run)
        if state in ("running", "interrupted"):  # one becomes the other without a trace here
            state = "unfinished"
        facts = {"step": None, "seconds": None, "host": None, "failures": 0, "error": None, "why": None}
        metrics: Mapping[str, Any] = {}
        if ended is not None:
            facts = {name: getattr(ended, name) for name in facts}
            metrics = ended.metrics
        found.append({"run": run.name, **varied[run.name], "status": state, **facts, **metrics})
    return found


def varying(runs: tuple[Run, ...]) -> dict[str, dict[str, Any]]:
    """By run, its values of the overrides in which runs differ, of a component its name; None where it has no such key."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    values: dict[str, dict[str, Any]] = {}
    for run in runs:
        leaves = codec.leaves(codec.encode(run.config))
        values[run.name] = {key: _value(key, leaves, run.overrides) for key in keys}
    differing = [key for key in next(iter(values.values()), ()) if len({repr(one[key]) for one in values.values()}) > 1]
    return {name: {key: one[key] for key in differing} for name, one in values.items()}


def _value(key: str, leaves: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    if key in leaves:
        return leaves[key]
    first = next((name for name in leaves if name.startswith(f"{key}.")), "")  # of a component, that it is registered under
    return leaves[first] if first.endswith("_name") else overrides.get(key)


def apart(runs: Sequence[Run]) -> dict[str, list[str]]:
    """By run, which of its overrides set it apart, as `top_k=4`: without keys that vary only together with one before them."""
    varied = varying(tuple(runs))
    keys: list[str] = []
    for key in next(iter(varied.values()), ()):
        if not any(together(key, before, varied) for before in keys):
            keys.append(key)
    found = {}
    for run in runs:
        there = {key: varied[run.name][key] for key in keys if key in run.overrides}
        last = [key.rpartition(".")[2] for key in there]
        short = [key if last.count(end) > 1 else end for key, end in zip(there, last)]
        found[run.name] = [f"{key}={value}" for key, value in zip(short, there.values())]
    return found


def together(one: str, other: str, varied: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether two keys change at the same runs."""
    pairs = {(repr(values[one]), repr(values[other])) for values in varied.values()}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def follows(one: str, other: str, varied: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a key that some runs have not has one value for each of another's, which are names, as of components, and no numbers."""
    if not all(isinstance(values[other], str) for values in varied.values()):
        return False
    pairs = {(repr(values[one]), repr(values[other])) for values in varied.values()}
    return any(values[one] is None for values in varied.values()) and len(pairs) == len({b for _, b in pairs})


def _column(values: list[Any]) -> pa.Array:
    """Numbers as numbers, truth values as such, all else as text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and float in kinds:
        return pa.array(values, pa.float64())
    if len(kinds) == 1 and kinds <= {int, bool, str}:
        return pa.array(values)
    return pa.array([None if value is None else str(value) for value in values], pa.string())
