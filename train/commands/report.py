"""`launch.py report RUN...`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from plait.configs.words import parse
from plait.train.console import console


@dataclasses.dataclass(frozen=True)
class ReportArgs:
    """Writes the page that shows one or several runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path | None = None
    """Folder of the page; `report/` in the run, or beside the first of several, by default."""


def run(args: Sequence[str]) -> None:
    """Writes the report."""
    options = parse(ReportArgs, args, prog="launch.py report")
    from plait.train.report import write_report

    console.print(f"report: {write_report(list(options.runs), options.out)}", markup=False)
