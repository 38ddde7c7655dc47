"""`launch.py sweep NAME|PRESET|FOLDER [--KEY VALUE,VALUE ...]`."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from plait.configs.command_line.options import split_options
from plait.configs.command_line.words import parse
from plait.configs.domains import Whole
from plait.train.terminal.console import console, notes


@dataclasses.dataclass(frozen=True)
class SweepArgs:
    """Trains every run of a study, or of a preset and lists of values: `--optimizer.learning-rate 1e-3,3e-3 --seed 0,1,2`.

    Every option of `train PRESET` may follow, with several values where commas part them. A pattern and other texts have commas of their
    own: write their flag several times. The same command again goes on: runs that are done stay, others are trained by whoever is free.
    One that asks for some of the folder's runs trains those; the folder in place of a name asks for all.
    """

    out: Path | None = None
    """Folder of the sweep; sweeps/NAME by default."""
    workers: Annotated[int, Whole(1, 1024)] = 1
    """Processes on this machine, which share its devices out; each trains one run after another."""
    dry_run: bool = False
    """Shows the runs and what they take, and starts none."""
    status: bool = False
    """Shows how the runs stand, on a terminal until they are over, and starts none."""


def run(args: Sequence[str]) -> int:
    """Trains, or shows, the runs of a sweep; or is one of its workers."""
    from plait.train.sweep.workers.pool import WORKER

    if WORKER in os.environ:
        from plait.train.sweep.workers.worker import work

        return work(Path(args[0]), **json.load(sys.stdin))
    if not args or args[0].startswith("-"):
        if {"-h", "--help"} & set(args):
            parse(SweepArgs, ["--help"], prog="launch.py sweep NAME|PRESET|FOLDER [options of train, with lists]")
        raise ValueError(
            "sweep needs a study, a preset or the folder of a sweep first, as in 'launch.py sweep lm_tiny --seed 0,1,2'; "
            "'launch.py list sweeps' shows studies"
        )
    return _run(args)


def _run(args: Sequence[str]) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # accelerators are the workers'
    from plait.train.sweep import show
    from plait.train.sweep.asked import asked_for
    from plait.train.sweep.record import begun, joined, read, refusal, wanted
    from plait.train.sweep.workers import claims
    from plait.train.sweep.workers.devices import shares
    from plait.train.sweep.workers.pool import run_workers

    mine, rest = split_options(SweepArgs, args[1:])
    options = parse(SweepArgs, mine, prog=f"launch.py sweep {args[0]} [options of train, with lists]")
    asked = asked_for(args[0], rest, options.out, compared=not options.dry_run)
    if options.dry_run:
        problem = refusal(asked.folder, asked.sweep)
        runs = joined(asked.folder, asked.sweep) if problem is None else asked.sweep.runs
        if asked.sweep.search is not None:
            console.print(show.space_table(asked.sweep.search))
        if runs:
            console.print(show.plan_table(runs, asked.folder, Path("runs") / runs[0].config.name, console.width))
        if problem is not None:
            notes.print(f"without --dry-run this is refused: {problem}", style="yellow")
        return 0
    if options.status:
        show.watch(asked.folder, read(asked.folder), console)
        return 0
    parts = shares(options.workers)
    sweep = begun(asked.folder, asked.sweep)
    some = {run.name for run in wanted(sweep.runs, asked.sweep)}
    only = None if sweep.search is not None or len(some) == len(sweep.runs) else frozenset(some)
    status = run_workers(asked.folder, sweep, parts, only)
    runs = read(asked.folder).runs
    trained = [run for run in runs if only is None or run.name in only]
    counted = collections.Counter(claims.status(asked.folder, run) for run in trained)
    others = f" of {len(trained)} asked for, {len(runs) - len(trained)} others there" if only is not None else ""
    results = asked.folder / "results.csv"
    console.print(f"{asked.folder}: {show.tally(counted)}{others}; results: {results}", markup=False)
    return status
