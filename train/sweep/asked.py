"""Which sweep a command line asks for."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path

from plait.configs.command_line.options import split_options
from plait.configs.command_line.words import flag, parse
from plait.configs.presets import preset, presets
from plait.configs.sweeps.base import SWEEPS, SweepConfig
from plait.configs.sweeps.lists import multiplied
from plait.configs.sweeps.rows import Rows, product, replaced, seeds
from plait.configs.sweeps.search import Choice, SearchConfig, ranges
from plait.configs.sweeps.stopping import StopConfig
from plait.train.sweep.record import SWEEP, Sweep, asked, check, read
from plait.train.sweep.runs import SweepError, resolved
from plait.train.sweep.stopping import check as check_stopping
from plait.train.sweep.trials import Search, searched


@dataclasses.dataclass(frozen=True)
class Asked:
    """A sweep and where it is, or is to be."""

    folder: Path
    sweep: Sweep


def asked_for(name: str, args: Sequence[str], out: Path | None, *, compared: bool = True) -> Asked:
    """What `launch.py sweep NAME ARGS` asks for: a study, a preset with lists of values, or the sweep that a folder holds.

    Args:
        compared: whether it must be the sweep that its folder holds, where that is one of this machine and is to be trained in.

    Raises:
        ValueError: there is none; values that cannot be used, all of them named.
    """
    if (Path(name) / SWEEP).exists():
        if args or out is not None:
            raise SweepError(f"{name!r} holds a sweep, whose runs stand in its {SWEEP}; leave out {' '.join(args) or '--out'}")
        return Asked(Path(name), read(Path(name)))
    study, rest = _study(name, args)
    search, rows = None, study.rows()
    if study.search.sampler is None:
        rows = multiplied(preset(study.preset), rows, rest)
    else:
        search, rows = _searched(study, rest)
    if study.seeds is not None:
        if given := next((key for row in rows for key in row if key in ("seed", "data.seed")), None):
            raise SweepError(
                f"{given} is given, and seeds={study.seeds} numbers the runs of each row; use --seeds None, or leave {flag(given)} out"
            )
        rows = product(rows, seeds(study.seeds))
    try:
        runs = resolved(study.preset, rows)
    except SweepError as error:
        if search is not None or not (between := ranges(rest)[0]):
            raise
        flags = ", ".join(map(flag, between))
        raise SweepError(
            f"{error}\n{flags}: a range is of a search; add --search.sampler tpe, or give values with commas"
        ) from None
    check_stopping(study.stop, runs or resolved(study.preset, search.rows(search.first)[:1]) if search else runs)
    found = asked((name, *args), runs, study.stop, search)
    folder = out or Path("sweeps") / name
    if compared and (folder / SWEEP).exists():
        check(folder, read(folder), found)
    return Asked(folder, found)


def _searched(study: SweepConfig, args: Sequence[str]) -> tuple[Search, Rows]:
    """What the trials of a study draw from, and the rows that are trained beside them."""
    between, rest = ranges(args)
    listed = multiplied(preset(study.preset), ({},), rest)
    given = {key: tuple(dict.fromkeys(row[key] for row in listed)) for key in listed[0]}
    known = {key: one for key, one in study.space().items() if key.partition("[")[0] not in given}
    space = {**known, **{key: Choice(one) if len(one) > 1 else one[0] for key, one in given.items()}, **between}
    rows = () if study.rows() == ({},) else study.rows()
    single = {key: one[0] for key, one in given.items() if len(one) == 1}
    return searched(study.search, study.preset, study.seeds, space), replaced(rows, single)


def _study(name: str, args: Sequence[str]) -> tuple[SweepConfig, list[str]]:
    """The study of a name, or of a preset alone, with the options of it that `args` set; and the other words."""
    known = SWEEPS.all()
    start: SweepConfig
    if name in known:
        start = known[name]()
    elif name in presets():
        start = SweepConfig(preset=name)
    elif Path(name).exists() or Path(name).name != name:
        raise _no_sweep(name)
    else:
        near = difflib.get_close_matches(name, [*known, *presets()], n=2)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join([*known, *presets()])}"
        raise SweepError(f"{name!r} is no study, no preset and no folder with a {SWEEP}; {hint}")
    mine, rest = split_options(type(start), args)
    of_rule, rest = split_options(StopConfig, rest, "stop.")
    of_search, rest = split_options(SearchConfig, rest, "search.")
    return parse(type(start), [*mine, *of_rule, *of_search], default=start, prog=f"launch.py sweep {name}"), rest


def _no_sweep(path: str) -> SweepError:
    """What is wrong with a path in place of a study or preset."""
    what = "a folder" if Path(path).is_dir() else "a file" if Path(path).exists() else "not there"
    new = "FOLDER" if what == "a file" else path
    holds = f" that holds no {SWEEP}: no sweep was begun there" if Path(path).is_dir() else ""
    return SweepError(
        f"{path!r} is {what}{holds}; give the folder of a sweep that was begun, or begin one with a study or a preset: "
        f"launch.py sweep PRESET --KEY VALUE,VALUE --out {new}"
    )
