"""`launch.py inspect RUN --text FILE`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from rich.table import Table
from rich.text import Text

from plait.configs.command_line.words import parse
from plait.train.inspection.options import InspectOptions
from plait.train.terminal.console import console


@dataclasses.dataclass(frozen=True)
class InspectArgs(InspectOptions):
    """Shows what the model of a checkpoint does on a text, as it is and without some of its heads."""

    ADDRESSES: ClassVar = ("run",)

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or a checkpoint in it; an imported model is one too."""


def run(args: Sequence[str]) -> None:
    """Inspects, shows losses and recall, and writes report and numbers."""
    options = parse(InspectArgs, args, prog="launch.py inspect")
    from plait.train.inspection.inspecting import inspect
    from plait.train.inspection.needles import TITLES
    from plait.train.remote.reading import give_back, run_here

    found, page = inspect(run_here(options.run, step=options.step), options)
    give_back(page.parent)
    table = Table(title=Text(f"{found.run} at step {found.trained.step}: {found.part} tokens of {options.text}"))
    for title in ("model", "loss (nats/token)", *TITLES):
        table.add_column(title, justify="left" if title == "model" else "right")
    for one in found.models:
        table.add_row(one.masking.name, f"{one.loss:.4f}", *one.recall.cells)
    console.print(table)
    console.print(f"report: {page}", markup=False)
