"""A folder of this machine that stands for what lies at an address: the same names and sizes, and content once it is read.

    read/SCHEME/BUCKET/...          the files; one that nobody has read yet is as long as its object, and has no content
    opened/SCHEME/BUCKET/...        the same of runs
    known/read/SCHEME/BUCKET/...    of each the version of its object, and whether its content is there

So files are found, sorted and divided as those of this machine are, and only what is read is fetched. Times of files are made of the
versions: the same on every machine, and others where a content is another. Whoever opens such a file calls `fetched` before.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from plait.data.remote.address import Address, cache
from plait.data.remote.store import Object, Store, StoreError

_FRESH_SECONDS = 60.0
"""For so long a listing is not asked for again by this process."""
_YEARS = 1 << 30
_KINDS = ("read", "opened")
_seen: dict[tuple[str, Path], tuple[float, Path]] = {}
_lock = threading.Lock()


def local(text: str | Path, field: str) -> Path:
    """The path of this machine that stands for a path or an address, or a pattern of either; files there may have no content yet.

    Args:
        field: the option that names it, for errors.

    Raises:
        StoreError: there is no such store, or it may not be read.
        StoreLost: it does not answer.
    """
    address = Address.of(text)
    if address is None:
        return Path(text).expanduser()
    with _lock:
        key = (str(address), cache())
        if key in _seen and time.monotonic() - _seen[key][0] < _FRESH_SECONDS:
            return _seen[key][1]
        _grow(address, field)
        _seen[key] = time.monotonic(), address.read
    return address.read


def _grow(address: Address, field: str) -> None:
    root = address
    if glob.has_magic(address.path):
        parts = list(itertools.takewhile(lambda part: not glob.has_magic(part), address.path.split("/")))
        if not parts:
            raise StoreError(f"{field}={str(address)!r} is a pattern of buckets; name one")
        root = Address(address.scheme, "/".join(parts))
    store = Store(root, field)
    there = store.objects()
    if not there:
        raise StoreError(f"{field}={str(address)!r}: nothing is there; check the address")
    if set(there) == {""} and root.path.endswith(".idx"):
        beside = Address(root.scheme, root.path.removesuffix("idx") + "bin")
        stand_for({name: known for name, known in Store(beside, field).objects().items() if not name}, beside.read)
    stand_for({name: known for name, known in there.items() if name or len(there) == 1}, root.read)


def stand_for(objects: dict[str, Object], root: Path) -> None:
    """Makes a folder that stands for an address have files for these objects, and no others; of an object itself the file `root`."""
    if "" in objects:
        _stand_for(root, objects[""])
        return
    if root.is_file():
        _forget(root)
    for path in [path for path in root.rglob("*") if not path.is_dir()] if root.is_dir() else []:
        if path.relative_to(root).as_posix() not in objects and (beside := _beside(path)) is not None and beside.is_file():
            _forget(path)  # results that were written beside stay
    root.mkdir(parents=True, exist_ok=True)
    for name, known in objects.items():
        _stand_for(root / name, known)


def fetched(path: Path, field: str = "data.source") -> Path:
    """The path, once its content is there where it stands for an object; any other path as it is.

    Raises:
        StoreError, StoreLost: as `local`.
        FileNotFoundError: the object is gone, or another by now.
    """
    beside = _beside(path)
    if beside is None:
        return path
    found = _read(beside)
    if found is None or found[1]:
        return path
    known, _ = found
    _, scheme, *key = path.relative_to(cache()).parts
    address = Address(scheme, "/".join(key))
    Store(address.parent, field).fetch(address.name, path, known)
    _stamp(path, known)
    _write(beside, known, True)
    return path


def fetch(paths: Iterable[Path], field: str = "data.source") -> None:
    """Fetches the content of several files at once."""
    left = [
        path for path in paths if (beside := _beside(path)) is not None and (found := _read(beside)) is not None and not found[1]
    ]
    if left:
        _several(lambda path: fetched(path, field), left)


def _several(function: Callable[[Path], object], paths: Sequence[Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8, "fetch") as pool:
        for future in [pool.submit(function, path) for path in paths]:
            future.result()


def _stand_for(path: Path, known: Object) -> None:
    """Makes `path` a file of the object's size, with what is there of its content if that is of this version."""
    beside = _beside(path)
    assert beside is not None
    if path.is_file() and _read(beside) in ((known, True), (known, False)) and path.stat().st_size == known.size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(beside, known, False)
    empty = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex[:12]}.tmp")
    with empty.open("wb") as file:
        file.truncate(known.size)
    _stamp(empty, known)
    empty.replace(path)


def _stamp(path: Path, known: Object) -> None:
    digest = hashlib.sha256(known.version.encode()).digest()
    at = int.from_bytes(digest[:8], "little") % _YEARS * 10**9
    os.utime(path, ns=(at, at))


def _forget(path: Path) -> None:
    path.unlink(missing_ok=True)
    if (beside := _beside(path)) is not None:
        beside.unlink(missing_ok=True)


def _beside(path: Path) -> Path | None:
    """The file that says what is known of one that stands for an object; None for any other file."""
    top = cache()
    try:
        inside = path.relative_to(top)
    except ValueError:
        return None
    return top / "known" / inside.parent / f"{inside.name}.json" if inside.parts[0] in _KINDS else None


def _read(beside: Path) -> tuple[Object, bool] | None:
    try:
        found = json.loads(beside.read_bytes())
        return Object(int(found["size"]), str(found["version"])), bool(found["whole"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(beside: Path, known: Object, whole: bool) -> None:
    beside.parent.mkdir(parents=True, exist_ok=True)
    unfinished = beside.with_name(f".{beside.name[:100]}.{uuid.uuid4().hex[:12]}.tmp")
    unfinished.write_text(json.dumps({"size": known.size, "version": known.version, "whole": whole}))
    unfinished.replace(beside)
