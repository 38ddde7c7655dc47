"""Folders of a cache that several processes may make at once: the first whole one counts, and no killed writer's part stays for ever."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import platform
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plait.data.config import DataError

ABANDONED_SECONDS = 24 * 3600.0
"""Silence after which a writer on another machine is taken for dead: not every file system shows its lock here."""
_OWNER = ".owner"
_SAYS = "plait writer on "


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to fill, renamed to `folder` when the block ends; where that is there by then, it stays.

    While the block runs, the writer holds a lock on a file beside its folder, by which `sweep` tells it from a dead one.

    Raises:
        DataError: nothing can be written there.
    """
    partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    owner = partial.with_name(partial.name + _OWNER)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with owner.open("w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: nobody can take it there, and nothing is swept
                fcntl.flock(lock, fcntl.LOCK_EX)
            lock.write(_SAYS + _machine())
            lock.flush()
            partial.mkdir()
            yield partial
            with contextlib.suppress(OSError):
                partial.rename(folder)
    except OSError as error:
        raise DataError(f"{folder.parent} cannot hold {folder.name}: {error}; set data.cache_dir to a folder that can") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            owner.unlink()


def sweep(cache: Path) -> None:
    """Removes what dead writers left in a cache."""
    for owner in cache.glob(f".*{_OWNER}"):
        partial = owner.with_name(owner.name.removesuffix(_OWNER))
        try:
            with owner.open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                said = lock.read()
                touched = max(path.stat().st_mtime for path in (owner, *partial.glob("*")))
                if said == _SAYS + _machine() or time.time() - touched > ABANDONED_SECONDS:
                    shutil.rmtree(partial, ignore_errors=True)
                    owner.unlink()
        except OSError:  # a live writer's, another user's, or gone by now
            continue


def checksum(description: Any) -> str:
    """sha256 of the fields of a dataclass but `check`, which keeps it."""
    fields = {name: value for name, value in dataclasses.asdict(description).items() if name != "check"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _machine() -> str:
    """The running kernel: those on it see each other's locks on every file system."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()
