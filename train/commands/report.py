"""`launch.py report RUN...`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from plait.configs.words import parse
from plait.train.console import console

EVERY = 30.0


@dataclasses.dataclass(frozen=True)
class ReportArgs:
    """Writes the page that shows one or several runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path | None = None
    """Folder of the page; `report/` in the run, or beside the first of several, by default."""
    watch: bool = False
    """Write it again, and have it reload itself, until all runs have ended."""
    every: float | None = None
    """Seconds between looks at the runs, with --watch; 30 by default."""


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

    if options.watch:
        from plait.train.report.watch import watch

        watch(options.runs, options.out, every, say)
    else:
        from plait.train.report import write_report

        say(f"report: {write_report(options.runs, options.out)}")
