"""A sweep on machines: every host runs the same line and takes runs until none is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from plait.configs.command_line.options import split_options
from plait.configs.command_line.words import parse
from plait.train.commands.sweep import SweepArgs
from plait.train.pods.launch_files.job import Job
from plait.train.pods.launch_files.machines import Machines
from plait.train.pods.launch_files.paths import paths_of
from plait.train.sweep.asked import asked_for
from plait.train.sweep.record import SWEEP, read

_MOST_ELEMENTS = 256  # unless more are asked for


def sweep_job(
    sweep: str, words: Sequence[str], machines: Machines, *, name: str | None, elements: int | None, written_by: tuple[str, ...]
) -> Job:
    """What starts a study, a preset with lists of values, or the sweep of a folder.

    Raises:
        ValueError: bad values in any run; more than one host for a run.
    """
    if machines.hosts > 1:
        raise ValueError(
            f"{machines.describe()}: a run of a sweep is trained by one host; use a target of one, and --elements for more of them"
        )
    own, rest = split_options(SweepArgs, words)
    options = parse(SweepArgs, own, prog="launch.py write-launch KIND --sweep NAME")
    if options.out is not None or options.dry_run or options.status:
        raise ValueError(f"{' '.join(own)} cannot be given to a launch file: it sets the folder of the sweep, and starts it")
    if (Path(sweep) / SWEEP).exists():
        if rest:
            raise ValueError(f"{sweep!r} holds a sweep, whose runs stand in its {SWEEP}; leave out {' '.join(rest)}")
        sweep, *rest = read(Path(sweep)).latest.command
    found = asked_for(sweep, rest, None, compared=False).sweep
    return Job(
        name=name or sweep.replace("_", "-"),
        machines=machines,
        preset=sweep,
        overrides=(*rest, *own),
        written_by=written_by,
        paths=paths_of(run.config for run in found.runs),
        elements=elements or min(math.ceil(found.planned / options.workers), _MOST_ELEMENTS),
    )
