"""`launch.py verify [train options]`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from plait.configs.command_line.options import split_options
from plait.configs.command_line.words import parse
from plait.configs.domains import Line, Name, Whole
from plait.train.pods.hosts.on_hosts import on_hosts
from plait.train.pods.hosts.supervise import STOPPED
from plait.train.terminal.console import console


@dataclasses.dataclass(frozen=True)
class VerifyArgs:
    """Tries the devices at hand before a long run: each op's kernels against the plain reference, forward, statistics and backward, and
    twice for the same bits; what each device and each axis of the mesh reaches; how long each op takes beside its roofline, XLA's form
    and, where they are installed, peers; and a short training. Exit status 1 where something failed.

    Every option of `train PRESET` may follow, for the training and its mesh.
    """

    preset: Name | None = None
    """What is trained; by default a model that suits the devices."""
    only: Line | None = None
    """Comma-separated parts: devices, agreement, speed, collectives, training. All by default."""
    ops: Line | None = None
    """Comma-separated ops to try and to time. All by default."""
    steps: Annotated[int, Whole(4, 10_000)] = 20
    """Of the training."""
    repeats: Annotated[int, Whole(1, 1000)] = 7
    """Turns of each timed call."""
    out: Path | None = None
    """New folder of verify.json and of the run; verify/DEVICE-TIME by default."""


def run(args: Sequence[str]) -> int:
    """Verifies here, or as one of several hosts."""
    return on_hosts("verify", args, lambda rest, _: _verify(rest), resumes=False)


def _verify(args: Sequence[str]) -> int:
    mine, rest = split_options(VerifyArgs, args)
    options = parse(VerifyArgs, mine, prog="launch.py verify [train options]")  # --help ends here
    from plait.train.verify.training import Stopped
    from plait.train.verify.verifying import verify

    try:
        return 1 if verify(options, rest) else 0
    except Stopped:
        console.print("stopped: nothing is judged, and the folder is free", markup=False)
        return STOPPED
