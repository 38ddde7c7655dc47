"""A run in a store through a folder of this machine: its numbers and one checkpoint, as they were when it was asked for."""

from __future__ import annotations

import logging
from pathlib import Path

from plait.configs import codec
from plait.data.remote.address import Address, stood_for
from plait.data.remote.store import Object, Store, StoreError, StoreLost
from plait.data.remote.tree import fetch, fetched, stand_for
from plait.train.remote.parts import check_holds, checkpoint, is_of_a_run, of_checkpoint
from plait.train.run_folder.contents import CHECKPOINTS
from plait.train.run_folder.owner import OWNER
from plait.train.run_folder.seal import MANIFEST, STAMPED

log = logging.getLogger("plait")

_TRIES = 5
_SHORT = 30.0


def run_here(run: str | Path, field: str = "run", *, step: int | None = None, weights: bool = True) -> Path:
    """The folder of this machine for a run at a path or an address, or for one of its checkpoints (RUN/checkpoints/STEP).

    Of a run at an address its files come, and the checkpoint of `step` (the newest by default) where `weights` are asked for. What is
    there from before and has not changed stays.

    Raises:
        StoreError: no run is there, no such checkpoint, or the store may not be read. StoreLost: it does not answer.
    """
    address = Address.of(run)
    if address is None:
        return Path(run)
    inside = ""
    if address.parent.name == CHECKPOINTS and address.name.isdecimal():
        inside, step = f"{CHECKPOINTS}/{address.name}", int(address.name)
        address = address.parent.parent
    store = Store(address, field)
    for left in reversed(range(_TRIES)):
        try:
            _bring(store, field, step, weights)
            break
        except FileNotFoundError as error:  # training has replaced it meanwhile
            if not left:
                raise StoreError(f"{field}={str(address)!r} changes faster than it can be read: {error}; try again") from error
    return address.opened / inside


def give_back(path: Path, *, new: bool = False) -> bool:
    """Also puts what was found about a run, a file or a folder of its folder here, where the run is; says so where that cannot be.

    Gives False for a `new` file whose name another machine's has there: that one stays.
    """
    address = stood_for(path)
    if address is None:
        return True
    try:
        if path.is_file():
            store = Store(address.parent, "run", patience=_SHORT)
            if new:
                return store.create(address.name, path.read_bytes())
            store.upload(address.name, path)
            return True
        store = Store(address, "run", patience=_SHORT)
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        store.each(lambda file: store.upload(file.relative_to(path).as_posix(), file), files)
    except (StoreError, StoreLost) as error:
        log.warning("%s; it is in %s alone", error, path)
    return True


def _bring(store: Store, field: str, step: int | None, weights: bool) -> None:
    root, there = store.address.opened, store.objects()
    steps = check_holds(there, store.address, field, step)
    wanted: dict[str, Object] = {
        name: known for name, known in there.items() if is_of_a_run(name) or name.startswith(f"{OWNER}/")
    }
    if weights and steps:
        chosen = steps[-1] if step is None else step
        folder = root / checkpoint(chosen)
        manifest = f"{checkpoint(chosen)}/{MANIFEST}"
        stand_for({**wanted, manifest: there[manifest]}, root)
        files = {*codec.load(dict[str, tuple[int, int]], fetched(folder / MANIFEST, field)), MANIFEST, STAMPED}
        wanted |= {
            name: there[name] for name in of_checkpoint(there, chosen) if name.removeprefix(f"{checkpoint(chosen)}/") in files
        }
    stand_for(wanted, root)
    if weights:
        (root / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    fetch([root / name for name in wanted], field)
