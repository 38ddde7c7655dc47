"""From rows of overrides to runs: each a checked config with a name, or all that is wrong with them at once."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from plait.configs import codec
from plait.configs.command_line.cli import parse_experiment
from plait.configs.components import ConfigError
from plait.configs.errors import is_bad_input
from plait.configs.experiment import ExperimentConfig
from plait.configs.presets import preset
from plait.configs.sweeps.lists import PATTERN
from plait.configs.sweeps.rows import Row, Rows, shown, words
from plait.configs.vocabulary import check_vocabulary
from plait.train.origin import settled
from plait.train.probes.base import Probes
from plait.train.watching.actions import watchers_of

log = logging.getLogger("plait")

_OWN = {
    "out": "the sweep gives each run a folder of its own in --out",
    "resume": "a sweep always goes on with what is there",
}
_SHOWN_ROWS = 8
_NO_CONTENT = ("out", "resume", "data.cache_dir")
"""Leaves that say where something lies, not what is trained."""
_LONGEST = 80


class SweepError(ConfigError):
    """A sweep that cannot be used as asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a sweep."""

    name: str
    overrides: Mapping[str, Any]
    """Of the preset, as given."""
    config: ExperimentConfig
    trial: int | None = None
    """Of the search that proposed it."""

    @property
    def content(self) -> str:
        """A hash of all that is trained: equal for equal runs."""
        leaves = codec.leaves(codec.encode(self.config))
        kept = {name: leaf for name, leaf in leaves.items() if name not in _NO_CONTENT}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:10]


def resolved(name: str, rows: Rows) -> tuple[Run, ...]:
    """The runs of a preset with each row of overrides; rows that make the same run make one.

    Raises:
        SweepError: for all values and keys, in any row, that cannot be used.
    """
    start, tried = preset(name), functools.cache(lambda *row: _tried(name, dict(row)))
    found: dict[str, Run] = {}
    problems: dict[tuple[str, str], list[int]] = {}
    varied = {key: [str(row.get(key)) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    varied = {key: values for key, values in varied.items() if len(set(values)) > 1}
    for number, row in enumerate(rows, start=1):
        config = tried(*row.items())
        if isinstance(config, str):
            for what, problem in _problems(row, tried):
                problems.setdefault((what, problem), []).append(number)
            continue
        run = Run(name=_readable({key: row[key] for key in varied if key in row}) or start.name, overrides=row, config=config)
        run = dataclasses.replace(run, name=f"{run.name}-{run.content}")
        if run.name.rpartition("-")[2] in found:
            log.warning("row %d (%s) makes the same run as another; it counts once", number, shown(row))
        found.setdefault(run.content, run)
    if problems:
        bad = len({number for numbers in problems.values() for number in numbers})
        lines = [f"  {_rows(numbers)}: {what}: {problem}" for (what, problem), numbers in problems.items()]
        raise SweepError(
            "\n".join([f"{bad} of {len(rows)} rows of overrides of {name} cannot be used, and nothing was started:", *lines])
        )
    return tuple(found.values())


def _tried(name: str, row: Row) -> ExperimentConfig | str:
    """The checked experiment of a row, or what is wrong with it."""
    try:
        if own := next((key for key in row if key in _OWN), None):
            raise SweepError(f"{own} cannot be given to a sweep: {_OWN[own]}")
        config = parse_experiment(name, words(row), prog="launch.py sweep")
        check_vocabulary(config)
        watchers_of(config, () if config.probe_every is None else Probes(config.probe).probes)
        settled(config)
        if config.wandb is not None and importlib.util.find_spec("wandb") is None:
            raise SweepError(
                f"wandb={config.wandb!r} needs the package wandb, which is not installed; pip install 'plait[wandb]'"
            )
    except ValueError as error:
        if not is_bad_input(error):
            raise
        return str(error)
    return config


def _problems(row: Row, tried: Callable[..., ExperimentConfig | str]) -> list[tuple[str, str]]:
    """Each override of a row that cannot be used beside those that can, with what is wrong; those that others hang on come first."""
    left = sorted(row.items(), key=lambda item: (item[0] != PATTERN, item[0].count(".")))
    good: list[tuple[str, Any]] = []
    while True:
        bad = []
        for item in left:
            found = tried(*good, item)
            if isinstance(found, str):
                bad.append((item, found))
            else:
                good.append(item)
        if len(bad) == len(left) or not bad:
            break
        left = [item for item, _ in bad]
    if not bad:  # the preset itself, or values that go together in this order only
        return [(shown(row), str(tried(*row.items())))]
    return [(f"{key}={value}", problem) for (key, value), problem in bad]


def _rows(numbers: list[int]) -> str:
    more = f" and {len(numbers) - _SHOWN_ROWS} more" if len(numbers) > _SHOWN_ROWS else ""
    return f"row{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:_SHOWN_ROWS]))}{more}"


def _readable(row: Row) -> str:
    """What sets a run apart, as part of a file name."""
    last = [key.rpartition(".")[2] for key in row]
    names = [key if last.count(short) > 1 else short for key, short in zip(row, last)]
    text = ",".join(f"{name}={value}" for name, value in zip(names, row.values()))
    return re.sub(r"[^A-Za-z0-9.,=+_]+", "-", text)[:_LONGEST].strip("-.,")
