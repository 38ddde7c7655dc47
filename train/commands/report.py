"""`launch.py report RUN...` and `launch.py report SWEEP`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from plait.configs.command_line.words import parse
from plait.train.terminal.console import console

EVERY = 30.0


@dataclasses.dataclass(frozen=True)
class ReportArgs:
    """Writes the page that shows one or several runs, or a sweep."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or the folder of a sweep."""
    out: Path | None = None
    """Folder of the page; `report/` in the run, or beside the first of several, by default."""
    watch: bool = False
    """Write it again, and have it reload itself, until all runs have ended."""
    every: float | None = None
    """Seconds between looks at the runs, with --watch; 30 by default."""
    by: str | None = None
    """Of a sweep, KEY or KEY,KEY: on the axis, and as colour. By default the learning rate where it varies, then the others."""
    metric: str | None = None
    """Of a sweep: the metric shown, of the end of each run; loss/val by default."""
    baseline: str | None = None
    """Of a sweep, KEY=VALUE: every arm is compared with the one that has it and is otherwise the same, seed by seed."""
    better: Literal["lower", "higher"] | None = None
    """Of a sweep: whether less of the metric is better, or more; by its name by default."""


def run(args: Sequence[str]) -> None:
    """Writes the report, once or until the runs have ended.

    Raises:
        ValueError: `every` is without `watch` or no time, a folder is not a run, or `out` holds files that are of no report.
    """
    options = parse(ReportArgs, args, prog="launch.py report")
    if options.every is not None and not options.watch:
        raise ValueError(f"every={options.every:g} is for pages that are written again; add --watch, or leave it out")
    every = EVERY if options.every is None else options.every
    if not (math.isfinite(every) and every >= 1):
        raise ValueError(f"every={every:g} must be at least 1 second")

    def say(text: str) -> None:
        console.print(text, markup=False)

    from plait.train.remote.reading import give_back, run_here
    from plait.train.sweep.record import SWEEP

    folders = tuple(run_here(run, "runs", weights=False) for run in options.runs)
    if options.watch and folders != options.runs:
        raise ValueError(
            f"watch=True looks at folders of this machine, and {options.runs[0]} is an address; write the page again"
        )
    options = dataclasses.replace(options, runs=folders)
    if any((folder / SWEEP).exists() for folder in options.runs):
        if len(options.runs) > 1 or options.watch:
            raise ValueError(f"{options.runs[0]} is among others or watched; a sweep has a page of its own, written once")
        from plait.train.report.sweeps import write_sweep

        by = tuple(key.strip().replace("-", "_") for key in options.by.split(",")) if options.by else ()
        key, equals, value = (options.baseline or "").partition("=")
        if options.baseline is not None and not (key and equals):
            raise ValueError(f"baseline={options.baseline!r} must be KEY=VALUE, as in --baseline model.pattern=softmax")
        baseline = f"{key.replace('-', '_')}={value}" if equals else None
        found = write_sweep(
            options.runs[0], options.out, by=by, metric=options.metric or "loss/val", baseline=baseline, better=options.better
        )
        say(f"report: {found}")
        return
    for name in ("by", "metric", "baseline", "better"):
        if (value := getattr(options, name)) is not None:
            raise ValueError(f"{name}={value!r} is for the folder of a sweep, which holds {SWEEP}; leave it out for runs")
    if options.watch:
        from plait.train.report.watch import watch

        watch(options.runs, options.out, every, say)
    else:
        from plait.train.report import write_report

        page = write_report(options.runs, options.out)
        give_back(page.parent)
        say(f"report: {page}")
