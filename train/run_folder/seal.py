"""The files of a checkpoint: what must be there, and the manifest that seals them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path, PurePosixPath

import tensorstore

from plait.configs import codec
from plait.configs.files import read_json, write_atomically

MANIFEST = "manifest.json"
STAMPED = "_CHECKPOINT_METADATA"  # gets the time at which the checkpoint is renamed, and is not needed to restore
_NEEDED = ("state/_METADATA", "state/manifest.ocdbt", "extra/metadata")


def seal(folder: Path, arrays: int) -> None:
    """Writes the manifest of a checkpoint of `arrays` arrays: the size and CRC-32 of its files as they are read back.

    Raises:
        OSError: it is not whole, and gets none.
    """
    if (problem := _hollow(folder, arrays)) is not None:
        raise OSError(f"{folder.name} {problem}")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / STAMPED)
    manifest = {path.relative_to(folder).as_posix(): _digest(path) for path in files}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None when they are as they were sealed."""
    if not (folder / MANIFEST).is_file():
        return f"has lost {MANIFEST}"
    try:
        manifest = codec.load(dict[str, tuple[int, int]], folder / MANIFEST)
    except ValueError as error:
        return f"has a broken {MANIFEST} ({error})"
    for name in _NEEDED:
        if name not in manifest:
            return f"has a {MANIFEST} without {name}"
    for name, written in manifest.items():
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            return f"has a broken {MANIFEST} (it names {name!r}, which is not in the checkpoint)"
        if not (folder / name).is_file():
            return f"has lost {name}"
        if (found := _digest(folder / name)) != written:
            return f"is damaged: {name} has {found[0]} bytes of CRC {found[1]:08x}, written were {written[0]} of {written[1] & 0xFFFFFFFF:08x}"
    return None


def unreadable(folder: Path) -> list[Path]:
    """The files of a checkpoint that the storage library reads before any is checked, and that are not what it takes for granted."""
    return [path for path in (folder / STAMPED, folder / "metrics" / "metrics") if path.exists() and not _is_object(path)]


def _is_object(path: Path) -> bool:
    try:
        return isinstance(read_json(path), dict)
    except (OSError, ValueError):
        return False


def _hollow(folder: Path, arrays: int) -> str | None:
    """What a checkpoint lacks of `arrays` arrays and what goes with them."""
    for name in _NEEDED:
        if not (folder / name).is_file():
            return f"has no {name}"
    state = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder / 'state'}/"}}
    keys = [key.decode() for key in tensorstore.KvStore.open(state).result().list().result()]
    described = {key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray")}
    filled = {key.rpartition("/")[0] for key in keys if not key.endswith("/.zarray")}
    if len(described & filled) != arrays:
        return f"has {len(described & filled)} of {arrays} arrays"
    return None


def _digest(path: Path) -> tuple[int, int]:
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return size, crc
