"""A run whose folder is in a store: who may train there, what is pulled before and pushed meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from plait.data.remote.address import Address
from plait.data.remote.store import Store, StoreError
from plait.train.pods.hosts import heartbeat
from plait.train.pods.hosts.together import first, together
from plait.train.remote.mirror import END_SECONDS, Mirror, settle
from plait.train.remote.ownership import Ownership
from plait.train.remote.pulling import pull, pull_config
from plait.train.run_folder.contents import CONFIG, RunError


@contextlib.contextmanager
def held(out: str | None, *, resume: bool) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """The run folder at an address belongs to this process inside, and the folder of this machine for it stands where the store does.

    Gives what raises FolderLost where it has been lost, and what begins to push. On leaving all is pushed, if pushing has begun. A path of this
    machine needs none of that.

    Raises:
        ValueError: it is used and `resume` is off, in use, or cannot be used.
        OSError: the store does not answer; on leaving, what could not be pushed is named.
    """
    address = None if out is None else Address.of(out)
    if address is None:
        yield _nothing, _nothing
        return
    store = new_store(address)
    if not resume and CONFIG in store.objects(CONFIG):
        raise RunError(f"out={out!r} already holds a run; use --resume to go on with it, or another --out")
    ownership = Ownership(store)
    begun: list[Mirror] = []

    def start() -> None:
        mirror.start()
        begun.append(mirror)

    try:
        mirror = Mirror(store, address.written, ownership.assure)
        mirror.known(pull(store, address.written))
        yield ownership.check, start
    except BaseException:
        with heartbeat.phase("push"):
            if begun:
                settle(mirror, ownership, failed=True)
            else:
                ownership.leave(trace=False)
        raise
    with heartbeat.phase("push"):
        if begun:
            settle(mirror, ownership, failed=False)
        else:
            ownership.leave(trace=False)


def new_store(address: Address, field: str = "out") -> Store:
    """The store to write at an address. Raises StoreError where it cannot be."""
    if address.scheme == "hf":
        raise StoreError(
            f"{field}={str(address)!r} would be a commit for every file; write to s3:// or gs://, and give hf:// to what is read"
        )
    return Store(address, field)


def config_of(out: str) -> Path:
    """The path of this machine for the config of a run folder, which is brought here where it lies in a store."""
    address = Address.of(out)
    if address is None:
        return Path(out) / CONFIG
    pull_config(new_store(address), address.written)
    return address.written / CONFIG


@contextlib.contextmanager
def made(path: Path, field: str) -> Iterator[Path]:
    """The folder of this machine to make a run in that is to lie at a path or an address; on leaving it is pushed there, by host 0.

    Raises:
        StoreError: there is something already, or nothing can be written.
        StoreLost: it could not be pushed; it is still here.
    """
    address = Address.of(path)
    if address is None:
        yield path
        return
    store = new_store(address, field)
    with together("store"):
        if first() and store.objects():
            raise StoreError(f"{field}={str(address)!r} is there already; give a new place")
    yield address.written
    with together("store"):
        if first():
            Mirror(store, address.written).finish(END_SECONDS)


def push_folder(out: str | None, name: str) -> None:
    """Pushes a folder of a run that was made after it has ended, as its report, where the run lies in a store.

    Raises:
        OSError: it cannot be pushed; the message says where it is.
    """
    address = None if out is None else Address.of(out)
    if address is None:
        return
    store, folder = new_store(address), address.written
    files = [path for path in sorted((folder / name).rglob("*")) if path.is_file()]
    store.each(lambda path: store.upload(path.relative_to(folder).as_posix(), path), files)


def _nothing() -> None:
    """A folder of this machine is lost to nobody by way of a store."""
