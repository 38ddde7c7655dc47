"""Compiled programs are kept from one process to the next. Needs no JAX."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import time
from pathlib import Path

from plait.data.remote.address import cache

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
"""Where JAX keeps them. Set by a user, it is left as it is, and so is everything in that folder."""
KEPT_DAYS = 30
"""A program that nobody has read for longer is removed."""


def keep_programs() -> None:
    """Names JAX the `usual` folder; called before JAX is imported. Where it cannot be written, nothing is kept."""
    if VARIABLE in os.environ:
        return
    with contextlib.suppress(OSError, RuntimeError):  # no home, or one that is read only
        folder = usual()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            _forget(folder)
            os.environ[VARIABLE] = str(folder)
            os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def usual() -> Path:
    """A folder in the user's cache, of this kind of processor: a home is shared by machines whose instructions differ.

    Raises:
        RuntimeError: this user has no home.
    """
    return cache() / "programs" / _processor()


def is_usual() -> bool:
    """Whether programs are kept where nobody chose the folder."""
    return VARIABLE in os.environ and os.environ[VARIABLE] == str(usual())


def _processor() -> str:
    """A name for what machine code runs here."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else [platform.processor()]
    instructions = next((line for line in lines if line.lower().startswith(("flags", "features"))), lines[0])
    return f"{platform.machine()}-{hashlib.sha256(instructions.encode()).hexdigest()[:12]}"


def _forget(folder: Path) -> None:
    """Removes what was not read or written lately."""
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for file in folder.iterdir():
        with contextlib.suppress(OSError):  # another process removed it
            used = file.stat()
            if max(used.st_atime, used.st_mtime) < oldest:
                file.unlink()
