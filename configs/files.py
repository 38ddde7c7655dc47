"""Files that are whole or not there. Needs nothing but the standard library."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes | str, *, durable: bool = True) -> None:
    """Writes `data` (text as UTF-8) beside `path` and renames it there, so that a reader sees the old file or the new one.

    Args:
        durable: whether it must outlive a crash of the machine, for which the write waits for the disk.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
