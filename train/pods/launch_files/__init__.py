"""Files that start pretraining on a pod: a JobSet for GKE, a batch script for SLURM, a script for Cloud TPU VMs."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plait.configs.command_line.options import split_options
from plait.configs.command_line.words import parse
from plait.configs.domains import is_line, shown
from plait.configs.experiment import ExperimentConfig
from plait.configs.files import write_atomically
from plait.train.pods.launch_files import gke, slurm, tpu_vm
from plait.train.pods.launch_files.job import Job, checked_experiment
from plait.train.pods.launch_files.machines import machines
from plait.train.pods.launch_files.options import GkeOptions, LaunchOptions, SlurmOptions, SweepOptions, TpuVmOptions, check_label
from plait.train.pods.launch_files.paths import doubts, paths_of
from plait.train.pods.launch_files.sweep import sweep_job

log = logging.getLogger("plait")


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of launch file."""

    options: type[LaunchOptions]
    render: Callable[[Any, Job], str]
    suffix: str


KINDS = {
    "gke": Kind(GkeOptions, gke.render, gke.SUFFIX),
    "slurm": Kind(SlurmOptions, slurm.render, slurm.SUFFIX),
    "tpu-vm": Kind(TpuVmOptions, tpu_vm.render, tpu_vm.SUFFIX),
}


def write_launch(args: Sequence[str]) -> tuple[Path, Job]:
    """Writes the file of `KIND PRESET [train overrides] --target TOPOLOGY [options]`, or of `KIND --sweep NAME ...`; returns its path and
    what it starts. Says which paths the hosts may not find.

    Raises:
        ValueError: bad values; an experiment that does not fit the machines; a file that is there already.
    """
    options, job, text = prepare(args)
    path = _write(options, text, f"{job.name}.{KINDS[args[0]].suffix}")
    for doubt in doubts(options, job.paths):
        log.warning("%s", doubt)
    return path, job


def prepare(args: Sequence[str]) -> tuple[LaunchOptions, Job, str]:
    """What `write_launch` does before it writes: the options, what is started, and the text of the file. Raises ValueError."""
    if not args or args[0] not in KINDS:
        raise ValueError(f"write-launch needs one of {', '.join(KINDS)} first, not {args[0] if args else 'nothing'}")
    if broken := [word for word in args if not is_line(word)]:
        raise ValueError(
            f"{shown(broken[0])} must be on one line and without control characters, as it becomes part of a line of the file; take them out"
        )
    kind = KINDS[args[0]]
    preset, rest = (args[1], args[2:]) if len(args) > 1 and not args[1].startswith("-") else (None, args[1:])
    mine, overrides = split_options(kind.options, rest)
    prog = f"launch.py write-launch {args[0]} {preset or 'PRESET'} [train overrides]"
    options, written_by = _options(kind, mine, overrides, prog), ("python", "launch.py", "write-launch", *args)
    there = machines(options.target, options.slices)
    if isinstance(options, SweepOptions) and options.sweep is not None:
        if preset is not None:
            raise ValueError(f"sweep={options.sweep!r} says what is trained, and so does {preset!r}; leave one out")
        job = sweep_job(options.sweep, overrides, there, name=options.name, elements=options.elements, written_by=written_by)
    elif preset is None:
        raise ValueError(f"write-launch {args[0]} needs a preset next, as in 'write-launch {args[0]} hybrid_1b'")
    else:
        job = Job(
            name=options.name or preset.replace("_", "-"),
            machines=there,
            preset=preset,
            overrides=tuple(overrides),
            written_by=written_by,
            paths=paths_of([checked_experiment(preset, overrides, there)]),
        )
    check_label("name", job.name)
    return options, job, kind.render(options, job)


def _options(kind: Kind, mine: Sequence[str], overrides: Sequence[str], prog: str) -> LaunchOptions:
    """The options of the file; `--help` ends here. Raises ValueError for flags that are neither of it nor of what it starts."""
    sweeps = any(word.partition("=")[0] == "--sweep" for word in mine)  # whose flags are looked at with its rows
    if not sweeps:
        _check_names(kind.options, overrides)
    return parse(kind.options, mine, prog=prog)


def _check_names(options: type[LaunchOptions], overrides: Sequence[str]) -> None:
    """Raises ValueError for a flag that is neither an option of the file nor one of the experiment."""
    own, experiment = (
        ["--" + field.name.replace("_", "-") for field in dataclasses.fields(c)] for c in (options, ExperimentConfig)
    )
    for word in overrides:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and "." not in flag and flag not in experiment and not flag.startswith("--no-"):
            near = difflib.get_close_matches(flag, [*own, *experiment], n=1)
            hint = f"did you mean {near[0]}?" if near else f"its options are {', '.join(own)}, and those of train"
            raise ValueError(f"{flag} is no option of this launch file; {hint}")


def _write(options: LaunchOptions, text: str, name: str) -> Path:
    """Writes `text` as a new file, whole or not at all; an older one only with `overwrite`."""
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"out={str(options.out)!r} is a file; give a folder")
    path = options.out / name
    try:
        write_atomically(path, text, new=not options.overwrite)
    except FileExistsError:
        raise ValueError(f"{path} is there already; use --overwrite to replace it, or another --out or --name") from None
    if path.suffix == ".sh":
        path.chmod(0o755)
    return path
