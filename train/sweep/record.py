"""`sweep.json`: what a sweep is, written once, which every further worker must want too."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.configs import codec
from plait.configs.components import ConfigError, validate
from plait.configs.files import write_atomically
from plait.configs.sweeps.rows import shown
from plait.configs.sweeps.stopping import StopConfig
from plait.train.pods.hosts import hardware
from plait.train.run_folder.owner import FolderInUse, owned
from plait.train.sweep.growth import Growth, growths, write_growths
from plait.train.sweep.runs import Run, SweepError
from plait.train.sweep.trials import Search, trials
from plait.train.sweep.workers import claims

log = logging.getLogger("plait")

SWEEP, CHANGES = "sweep.json", "changes.diff"
_MOST = 10
"""Differences that an error lists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What `sweep.json` holds."""

    command: tuple[str, ...]
    """Words after `launch.py sweep` that began it."""
    since: str
    commit: str | None
    """Of plait's source, with `-dirty` where `changes.diff` stands beside this file."""
    versions: Mapping[str, str]
    runs: tuple[Run, ...]
    stop: StopConfig = StopConfig()
    """When runs end early."""
    search: Search | None = None
    """What is proposed beside `runs`."""
    grown: tuple[Growth, ...] = ()
    """By which commands the last of `runs` were added; they stand in a file of their own."""

    @property
    def latest(self) -> Growth | Sweep:
        """What began it, or added runs last: its command asks for all of them."""
        return self.grown[-1] if self.grown else self

    @property
    def planned(self) -> int:
        """Runs there are to be, those of trials that were not proposed yet among them."""
        own = sum(run.trial is None for run in self.runs)
        return own if self.search is None else own + self.search.options.trials * (self.search.seeds or 1)


def asked(command: tuple[str, ...], runs: tuple[Run, ...], stop: StopConfig | None = None, search: Search | None = None) -> Sweep:
    """A sweep that is to be begun here and now."""
    since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return Sweep(
        command=command,
        since=since,
        commit=hardware.commit(),
        versions=hardware.versions(),
        runs=runs,
        stop=stop or StopConfig(),
        search=search,
    )


def read(folder: Path) -> Sweep:
    """The sweep in `folder`, with the runs of all trials so far. Raises SweepError where there is none."""
    if not (folder / SWEEP).exists():
        raise SweepError(f"{str(folder)!r} holds no {SWEEP}; give the --out of a sweep that was begun")
    found = codec.load(Sweep, folder / SWEEP)
    for index, run in enumerate(found.runs):
        validate(run.config, f"{SWEEP}: runs.{index}.config")
    if grown := growths(folder):
        found = dataclasses.replace(found, runs=(*found.runs, *(run for one in grown for run in one.runs)), grown=grown)
    if found.search is None:
        return found
    every = {run.name: run for run in found.runs} | {run.name: run for trial in trials(folder) for run in trial.runs}
    return dataclasses.replace(found, runs=tuple(every.values()))


def mark(folder: Path) -> tuple[int, int] | None:
    """Another one where the folder was removed and a sweep begun there anew; None where it holds none."""
    try:
        found = (folder / SWEEP).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def begun(folder: Path, sweep: Sweep) -> Sweep:
    """The sweep in `folder`, which is begun where there is none yet, by one of all that try, and is given the runs that it lacks where all
    that it has are asked for. Where only some are asked for, it stays what it is; see `wanted`.

    Raises:
        SweepError: there is another one; the message says in what it differs.
    """
    _check_folder(folder)
    while not (folder / SWEEP).exists():
        try:
            with owned(folder):
                if not (folder / SWEEP).exists():
                    _check_remains(folder, sweep)
                    if changes := hardware.changes():
                        write_atomically(folder / CHANGES, changes)
                    write_atomically(folder / SWEEP, json.dumps(_encoded(sweep), indent=1) + "\n")
        except FolderInUse:
            time.sleep(0.2)
    while True:
        found = read(folder)
        check(folder, found, sweep)
        new = further(found, sweep)
        if not new:
            if found.search is None and len(sweep.runs) < len(found.runs):
                log.info(
                    "%s: %d runs there, of which the %d that are asked for now are trained",
                    folder,
                    len(found.runs),
                    len(sweep.runs),
                )
            return found
        try:
            with owned(folder):
                if read(folder).grown == found.grown:  # else another command was first
                    log.info("%s: %d runs there, %d more now", folder, len(found.runs), len(new))
                    facts = {name: getattr(sweep, name) for name in ("command", "since", "commit", "versions")}
                    write_growths(folder, (*found.grown, Growth(**facts, runs=new)), hardware.changes())
        except FolderInUse:
            time.sleep(0.2)


def further(there: Sweep, sweep: Sweep) -> tuple[Run, ...]:
    """The runs that are asked for and are not there; none where a search proposes them."""
    known = {run.content for run in there.runs}
    return () if sweep.search is not None else tuple(run for run in sweep.runs if run.content not in known)


def wanted(runs: Sequence[Run], sweep: Sweep) -> tuple[Run, ...]:
    """Those of some runs that are asked for, under the names that they have there."""
    contents = {run.content for run in sweep.runs}
    return tuple(run for run in runs if run.content in contents)


def joined(folder: Path, sweep: Sweep) -> tuple[Run, ...]:
    """The runs that are trained, where nothing refuses the sweep: those of the folder that are asked for, then further ones."""
    if sweep.search is not None or not (folder / SWEEP).exists():
        return sweep.runs
    there = read(folder)
    return wanted((*there.runs, *further(there, sweep)), sweep)


def _encoded(sweep: Sweep) -> Any:
    return {name: value for name, value in codec.encode(sweep).items() if name != "grown"}


def refusal(folder: Path, sweep: Sweep) -> str | None:
    """Why `begun` would refuse the folder for the sweep; None where it would not. Nothing is written."""
    try:
        _check_folder(folder)
        if (folder / SWEEP).exists():
            check(folder, read(folder), sweep)
        else:
            _check_remains(folder, sweep)
    except ConfigError as error:
        return str(error)
    return None


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise SweepError(f"out={str(folder)!r} is a file; give a folder")


def _check_remains(folder: Path, sweep: Sweep) -> None:
    """Raises SweepError where a sweep was here whose `sweep.json` is gone and whose runs this one has not: its table would be lost."""
    names = {run.name for run in (*sweep.runs, *(run for one in growths(folder) for run in one.runs))}
    there = sorted(path.name for path in (folder / claims.CLAIMS).glob("*") if path.is_dir())
    if others := [name for name in there if name not in names and not (sweep.search is not None and name.startswith("trial="))]:
        raise SweepError(
            f"out={str(folder)!r} holds no {SWEEP} and {len(others)} runs of another sweep, as {others[0]}; restore that file, "
            "use the command that began it, or another --out"
        )


def check(folder: Path, old: Sweep, new: Sweep) -> None:
    """Raises SweepError where the runs of two sweeps differ, and the new ones are neither some of the old sweep's nor all of them and more;
    says where their code does."""
    before, now = ({run.content: run for run in one.runs if run.trial is None} for one in (old, new))
    nested = old.search is None and new.search is None and (before.keys() <= now.keys() or now.keys() <= before.keys())
    if not nested and before.keys() != now.keys():
        found = _differences(
            [before[one] for one in before.keys() - now.keys()], [now[one] for one in now.keys() - before.keys()]
        )
        more = f"\n  and {len(found) - _MOST} more" if len(found) > _MOST else ""
        lines = "".join(f"\n  {line}" for line in found[:_MOST])
        raise SweepError(
            f"out={str(folder)!r} holds another sweep, begun with {' '.join(old.latest.command)!r}; use that command, one that asks for "
            f"some of its runs, or for all and more, or another folder, as --out {folder}-2. "
            f"It differs in:{lines}{more}"
        )
    if old.search != new.search:
        found = codec.differences(codec.encode(old.search), codec.encode(new.search), "search")
        raise SweepError(f"out={str(folder)!r} holds another search: {'; '.join(found[:_MOST])}; use that, or another --out")
    if old.stop != new.stop:
        found = codec.differences(codec.encode(old.stop), codec.encode(new.stop), "stop")
        raise SweepError(
            f"out={str(folder)!r} holds a sweep that ends runs by another rule: {'; '.join(found)}; use that, or another --out"
        )
    last = old.latest
    if (last.commit, last.versions) != (new.commit, new.versions):
        code = codec.differences({"commit": last.commit, **last.versions}, {"commit": new.commit, **new.versions})
        log.warning("%s was begun with other code: %s", folder, "; ".join(code))


def _differences(old: list[Run], new: list[Run]) -> list[str]:
    """In what runs differ that are in one of two sweeps: a config changed under the same overrides, else runs that came or went."""
    key = lambda run: json.dumps(codec.encode(dict(run.overrides)), sort_keys=True)
    before, now = ({key(run): run for run in runs} for runs in (old, new))
    found = []
    for name in before.keys() & now.keys():
        changed = codec.differences(_leaves(before[name]), _leaves(now[name]))
        found += [f"{shown(before[name].overrides)}: {line}" for line in changed]
    found += [f"there and not asked for now: {shown(run.overrides)}" for name, run in before.items() if name not in now]
    found += [f"asked for now and not there: {shown(run.overrides)}" for name, run in now.items() if name not in before]
    return sorted(found)


def _leaves(run: Run) -> dict[str, Any]:
    return codec.leaves(codec.encode(run.config))
