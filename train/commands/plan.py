"""`launch.py plan PRESET --target TARGET [overrides]`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from plait.configs.command_line.options import split_options
from plait.configs.command_line.words import parse
from plait.configs.domains import Name, Whole
from plait.train.terminal.console import console


@dataclasses.dataclass(frozen=True)
class PlanArgs:
    """Says what a preset's training step takes on TPUs or GPUs that are not at hand: memory, operations, exchange, time at best.

    The step is compiled ahead of time, kernels included. Every option of `train PRESET` may follow.
    """

    target: Name
    """TPU slice or GPUs, as v5e:16x16, v5p:4x8x8, h100:8x8 or h100x64; cpu:8 for devices of this machine."""
    slices: Annotated[int, Whole(1, 256)] = 1
    """TPU slices of that shape, joined by the network."""
    search: bool = False
    """Also tries other meshes, recomputation and micro-batches, and ranks those that fit."""
    compile: Annotated[int, Whole(0, 100)] = 2
    """With --search: layouts to compile, the best by estimate."""
    exact: bool = False
    """Estimates each TPU kernel of the step by itself, with its own shapes, and keeps what is found; without, its kind speaks for it."""
    out: Path | None = None
    """Folder of plan.md and plan.json; plans/PRESET-TARGET by default."""


def run(args: Sequence[str]) -> None:
    """Plans a preset for a machine."""
    from plait.train.pods.plan.topology import KNOWN

    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        raise ValueError("plan needs a preset first, as in 'launch.py plan hybrid_1b --target v5e:16x16'")
    mine, rest = split_options(PlanArgs, args)
    if not {"-h", "--help"} & set(mine) and not any(word.split("=")[0] == "--target" for word in mine):
        raise ValueError(f"plan needs a --target\nknown targets:\n{KNOWN}")
    options = parse(PlanArgs, mine, prog="launch.py plan PRESET [train overrides]")  # --help ends here
    from plait.configs.command_line.cli import parse_experiment
    from plait.train.pods.plan.command import run_plan

    config = parse_experiment(rest[0], rest[1:], prog="launch.py plan")
    search = options.compile if options.search else None
    run_plan(config, options.target, slices=options.slices, search=search, exact=options.exact, out=options.out, console=console)
