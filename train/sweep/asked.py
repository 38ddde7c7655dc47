"""Which sweep a command line asks for."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path

from plait.configs.options import split_options
from plait.configs.presets import preset, presets
from plait.configs.sweeps.base import SWEEPS, SweepConfig
from plait.configs.sweeps.lists import multiplied
from plait.configs.sweeps.rows import product, seeds
from plait.configs.words import parse
from plait.train.sweep.record import SWEEP, Sweep, asked, check, read
from plait.train.sweep.runs import SweepError, resolved


@dataclasses.dataclass(frozen=True)
class Asked:
    """A sweep and where it is, or is to be."""

    folder: Path
    sweep: Sweep


def asked_for(name: str, args: Sequence[str], out: Path | None, *, begun_elsewhere: bool = False) -> Asked:
    """What `launch.py sweep NAME ARGS` asks for: a study, a preset with lists of values, or the sweep that a folder holds.

    Args:
        begun_elsewhere: whether the folder is another machine's, and none here is looked at.

    Raises:
        ValueError: there is none; values that cannot be used, all of them named.
    """
    if (Path(name) / SWEEP).exists():
        if args or out is not None:
            raise SweepError(f"{name!r} holds a sweep, whose runs stand in its {SWEEP}; leave out {' '.join(args) or '--out'}")
        return Asked(Path(name), read(Path(name)))
    study, rest = _study(name, args)
    rows = multiplied(preset(study.preset), study.rows(), rest)
    if study.seeds is not None:
        rows = product(rows, seeds(study.seeds))
    found = asked((name, *args), resolved(study.preset, rows))
    folder = out or Path("sweeps") / name
    if not begun_elsewhere and (folder / SWEEP).exists():
        check(folder, read(folder), found)
    return Asked(folder, found)


def _study(name: str, args: Sequence[str]) -> tuple[SweepConfig, list[str]]:
    """The study of a name, or of a preset alone, with the options of it that `args` set; and the other words."""
    known = SWEEPS.all()
    start: SweepConfig
    if name in known:
        start = known[name]()
    elif name in presets():
        start = SweepConfig(preset=name)
    else:
        near = difflib.get_close_matches(name, [*known, *presets()], n=2)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join([*known, *presets()])}"
        raise SweepError(f"{name!r} is no study, no preset and no folder with a {SWEEP}; {hint}")
    mine, rest = split_options(type(start), args)
    return parse(type(start), mine, default=start, prog=f"launch.py sweep {name}"), rest
