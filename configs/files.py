"""Files that are whole or not there, and JSON that is what it should be. Needs nothing but the standard library."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

LEFT_SECONDS = 3600.0
"""After so long an unfinished file has no writer any more."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES)
"""What file systems without hard links answer."""
DEEPEST = 64
"""Objects and lists inside each other that are read."""


def write_atomically(path: Path, data: bytes | str, *, durable: bool = True, new: bool = False) -> None:
    """Writes `data` (text as UTF-8) beside `path` and renames it there, so that a reader sees the old file or the new one.

    Args:
        durable: whether it must outlive a crash of the machine, for which the write waits for the disk.
        new: whether nothing may be there yet: of all that write a new file of one name at once, one does.

    Raises:
        FileExistsError: `new`, and something is there.
        OSError: it cannot be written; what was there stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # it is the parent that is there, and no folder
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from error
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if new:
            _take_name(path, unfinished)
        else:
            unfinished.replace(path)
        _sweep(path)
    finally:
        unfinished.unlink(missing_ok=True)


def first_new(path: Path, make: Callable[[Path], object], *, folder: bool = False) -> Path:
    """The first of `path`, NAME_2.json, NAME_3.json and so on that `make` makes; of a folder NAME-2, NAME-3.

    Args:
        make: raises FileExistsError where something is there, also where another process makes it at the same time.
    """
    found, number = path, 1
    while True:
        try:
            make(found)
            return found
        except FileExistsError:
            number += 1
            found = path.with_name(f"{path.name}-{number}" if folder else f"{path.stem}_{number}{path.suffix}")


def _take_name(path: Path, whole: Path) -> None:
    """Gives a whole file its name too. Raises FileExistsError where the name is taken."""
    try:
        path.hardlink_to(whole)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        path.touch(exist_ok=False)  # holds the name, for an instant without content
        whole.replace(path)


def _sweep(path: Path) -> None:
    """Removes what writers of this file that were killed left beside it, a good while before now by the clock of the file system."""
    with contextlib.suppress(OSError):
        written = path.stat().st_mtime
        for other in path.parent.iterdir():
            left = other.name.startswith(f".{path.name}.") and other.name.endswith(".tmp")
            if left and written - other.stat().st_mtime > LEFT_SECONDS:
                other.unlink(missing_ok=True)


def parse_json(text: bytes | str, *, infinities: bool = False) -> Any:
    """A JSON text, strictly: UTF-8, finite numbers, no name twice in an object, nothing nested more than `DEEPEST` deep.

    Args:
        infinities: whether `Infinity` may stand for a number, as Python writes it.

    Raises:
        ValueError: it is none; the message says why, and not where it is from.
    """
    try:
        value = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            parse_constant=_infinity if infinities else _no_number,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_each_once,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            item for one in level if isinstance(one, dict | list) for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


def read_json(path: Path, *, infinities: bool = False) -> Any:
    """The JSON of a file, as strict as `parse_json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read or is not JSON; the message begins with the path.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError(f"{path} cannot be read: it is no file; take it away")
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}; give a file that can") from None
    try:
        return parse_json(content, infinities=infinities)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON that can be used: {error}; restore the file") from None


_TOO_DEEP = f"it is nested more than {DEEPEST} deep"


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number of JSON")


def _infinity(word: str) -> float:
    return _no_number(word) if word == "NaN" else float(word)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a number")
    return number


def _whole(text: str) -> int:
    if len(text) > 400:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice in one object")
    return found
