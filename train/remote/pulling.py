"""What a store holds of a run, brought to the folder of this machine in which the run goes on."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from plait.configs import codec
from plait.data.remote.store import Object, Store, StoreError
from plait.train.remote.parts import checkpoint, is_of_a_run, whole_steps
from plait.train.run_folder.contents import CHECKPOINTS, CONFIG
from plait.train.run_folder.going_on import checkpoint_steps
from plait.train.run_folder.seal import MANIFEST, STAMPED, damage

log = logging.getLogger("plait")

_PULLS = ".pull-"


@dataclasses.dataclass
class Pulled:
    """What of a run is in a store, and what of that has just come from there."""

    files: set[str] = dataclasses.field(default_factory=set)
    """Names of the run's files there, but its checkpoints'."""
    pulled: set[str] = dataclasses.field(default_factory=set)
    """Those of them that came."""
    steps: dict[int, bytes] = dataclasses.field(default_factory=dict)
    """The whole checkpoints there, with their manifests."""


def pull(store: Store, folder: Path) -> Pulled:
    """Brings to `folder` what it lacks to go on where the run in the store stands; where `folder` is as far or further, its files stay.

    Checkpoints come the newest first, each whole or not at all; a damaged one is left in the store and the one before it is taken.

    Raises:
        StoreError: the store cannot be used. StoreLost: it does not answer.
    """
    while True:
        try:
            return _pull(store, folder)
        except FileNotFoundError as error:  # who had the folder before was still removing
            log.debug("%s; looking again", error)


def _pull(store: Store, folder: Path) -> Pulled:
    there = store.objects()
    found = Pulled(files={name for name in there if is_of_a_run(name)})
    if CONFIG not in there:
        return found
    for left in folder.glob(f"{_PULLS}*"):
        shutil.rmtree(left, ignore_errors=True)
    here, steps = checkpoint_steps(folder), whole_steps(there)
    behind = bool(steps) and max(steps) > max(here, default=-1)
    wanted = [name for name in sorted(found.files) if behind or not (folder / name).is_file()]
    if behind or wanted:
        log.info("pulling %s to %s", store.address, folder)
    store.each(lambda name: store.fetch(name, folder / name, there[name]), wanted)
    found.pulled = set(wanted)
    for step in reversed(steps):
        manifest = store.read(f"{checkpoint(step)}/{MANIFEST}")
        if manifest is None:
            raise FileNotFoundError(f"{store.address / checkpoint(step)} is gone")
        if step in here or not behind or (problem := _pull_checkpoint(store, folder, step, there)) is None:
            found.steps[step] = manifest
        else:
            log.warning("%s %s; it is not used", store.address / checkpoint(step), problem)
    if steps and not found.steps and not here:
        raise StoreError(
            f"out={str(store.address)!r} has no checkpoint that is whole, and all are damaged: restore one, or use another --out"
        )
    return found


def _pull_checkpoint(store: Store, folder: Path, step: int, there: Mapping[str, Object]) -> str | None:
    """Brings a checkpoint; what is wrong with it, where it cannot be used."""
    partial = folder / f"{_PULLS}{step}-{uuid.uuid4().hex[:8]}"
    try:
        if (problem := fetch_checkpoint(store, partial, step, there)) is None:
            (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            partial.rename(folder / checkpoint(step))
        return problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fetch_checkpoint(store: Store, partial: Path, step: int, there: Mapping[str, Object]) -> str | None:
    """Makes `partial` a checkpoint of the store; what is wrong with it, where it is damaged there.

    Raises:
        FileNotFoundError: it is being removed.
    """
    name = checkpoint(step)
    store.fetch(f"{name}/{MANIFEST}", partial / MANIFEST, there[f"{name}/{MANIFEST}"])
    try:
        files = [*codec.load(dict[str, tuple[int, int]], partial / MANIFEST), STAMPED]
    except ValueError as error:
        return f"has a broken {MANIFEST} ({error})"
    inside = [file for file in files if f"{name}/{file}" in there and ".." not in file.split("/")]
    store.each(lambda file: store.fetch(f"{name}/{file}", partial / file, there[f"{name}/{file}"]), inside)
    return damage(partial)


def pull_config(store: Store, folder: Path) -> None:
    """Brings the config of a run that is in the store and not in `folder`, to say what goes on there.

    Raises:
        StoreError: the store cannot be used. StoreLost: it does not answer.
    """
    if (folder / CONFIG).is_file():
        return
    there = store.objects(CONFIG)
    if CONFIG in there:
        try:
            store.fetch(CONFIG, folder / CONFIG, there[CONFIG])
        except FileNotFoundError as error:
            raise StoreError(f"{error}; look who else writes there") from error
