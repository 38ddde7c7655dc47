"""The whole verification: its parts in order, the table and the file."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from plait.configs.files import first_new
from plait.kernels.chips import chip_of
from plait.train.mesh import make_mesh
from plait.train.pods.hosts import hardware, together
from plait.train.run import write_json
from plait.train.run_folder.owner import OWNER, owned
from plait.train.terminal.console import console, notes
from plait.train.verify.agreement import agreement, known
from plait.train.verify.collectives import collectives
from plait.train.verify.devices import devices, peak_here
from plait.train.verify.findings import Finding, as_json, failed, show
from plait.train.verify.rooflines import Shape
from plait.train.verify.speed import speed
from plait.train.verify.training import training, training_config
from plait.train.verify.trials import LONG, TIMED

if TYPE_CHECKING:
    from plait.train.commands.verify import VerifyArgs

FILE, TRAINING = "verify.json", "training"
TRIED = {"cpu": Shape(2, 160, 4, 32, 512, group=2), "accelerator": Shape(2, 512, 4, 128, 4096, group=2)}
"""Of the calls that are held against the reference, which runs on the CPU, token by token."""
LONG_AT = Shape(1, 4096, 1, 128, 4096)
"""Likewise, of rows that are several tiles long, on an accelerator."""
TIMED_AT = {"cpu": Shape(1, 1024, 4, 64, 8192), "accelerator": Shape(4, 4096, 16, 128, 32_768)}


def verify(options: VerifyArgs, words: Sequence[str]) -> list[str]:
    """What failed, on any host; nothing where all is well.

    Args:
        options: of the command.
        words: options of `train`.

    Raises:
        ValueError: an option does not fit; before anything is tried.
    """
    began, at = time.monotonic(), datetime.datetime.now(datetime.UTC)
    device, kind = jax.devices()[0], "cpu" if jax.default_backend() == "cpu" else "accelerator"
    chip = chip_of(device.device_kind)
    name = chip.generation if chip is not None else device.platform
    trials = known(ops := _listed(options.ops))
    usual = Path("verify") / f"{name}-{at:%Y%m%d-%H%M%S}"
    wanted = Path(together.broadcast(str(options.out or usual)) if together.count() > 1 else options.out or usual)
    config = training_config(options.preset, words, wanted / TRAINING, options.steps)
    mesh = make_mesh(config.mesh)
    dtypes = ("float32",) if kind == "cpu" else ("bfloat16", "float32")
    parts: dict[str, Callable[[], Iterator[Finding]]] = {
        "devices": lambda: devices(dtypes[0]),
        "agreement": lambda: chain(
            agreement(trials, TRIED[kind], dtypes), agreement(known(ops, LONG) if kind == "accelerator" else {}, LONG_AT, dtypes)
        ),
        "speed": lambda: speed(
            {name: trial for name, trial in trials.items() if name in TIMED},
            TIMED_AT[kind],
            dtypes[0],
            peak_here(dtypes[0]),
            options.repeats,
        ),
        "collectives": lambda: collectives(mesh, options.repeats),
        "training": lambda: training(config),
    }
    for part in (asked := _listed(options.only) or tuple(parts)):
        if part not in parts:
            raise ValueError(f"only={part!r} is no part; use some of {', '.join(parts)}")
    with contextlib.ExitStack() as held:
        take = lambda: list(map(str, held.enter_context(_taken(wanted, usual=options.out is None))))
        folder, run = map(Path, together.decide("folder", take))
        config = dataclasses.replace(config, out=str(run))
        if chip is None and kind == "accelerator":
            notes.print(
                f"{device.device_kind!r} is a device that plait does not know: kernels are declined, rooflines are measured"
            )
        found = []
        for part in asked:
            for finding in parts[part]():
                found.append(finding)
                notes.print(f"{time.monotonic() - began:6.1f} s  {finding.status:8} {finding.what}  {finding.by}")
        problems = [f"{one.what}, {one.by}: {one.detail}" for one in failed(found)]
        if together.first():
            show(found, console)
            facts = {"at": at.isoformat(timespec="seconds"), "seconds": time.monotonic() - began, **hardware.environment()}
            write_json(folder / FILE, {**facts, "findings": as_json(found)}, new=True)
            console.print(f"{len(found)} findings, {len(problems)} failed; written to {folder / FILE}", markup=False)
    for problem in problems:
        notes.print(f"failed: {problem}", style="red")
    elsewhere = together.any_of("; ".join(problems) or None)
    return problems or ([elsewhere] if elsewhere else [])


def _listed(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(","))


@contextlib.contextmanager
def _taken(wanted: Path, *, usual: bool) -> Iterator[tuple[Path, Path]]:
    """The folder, which no other verification gets inside, and that of the run in it; where the usual one is there, the next that is not.

    One in which a verification was killed is free, and the run that it left stays beside the new one.

    Raises:
        ValueError: another than the usual one is there and holds something else, or belongs to a process that lives.
    """
    wanted.parent.mkdir(parents=True, exist_ok=True)
    folder = first_new(wanted, Path.mkdir, folder=True) if usual else wanted
    _check(folder)
    with owned(folder):
        _check(folder)  # another may have ended there meanwhile
        names = (f"{TRAINING}{f'-{number}' if number > 1 else ''}" for number in count(1))
        yield folder, next(path for path in map(folder.joinpath, names) if not path.exists())
    if (folder / FILE).exists():
        shutil.rmtree(folder / OWNER, ignore_errors=True)


def _check(folder: Path) -> None:
    """Raises ValueError where there is more than what a verification leaves that was killed."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""} if folder.exists() else set()
    left = {OWNER, *(name for name in names if re.fullmatch(rf"{TRAINING}(-[0-9]+)?", name))} if OWNER in names else set()
    if names - left:
        raise ValueError(f"out={str(folder)!r} is there already; give a new folder")
