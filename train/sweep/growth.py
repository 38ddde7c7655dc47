"""`grown.json`: the runs that a sweep was given after it began, each time by a command that asks for all that were there and for more.

It is a file of its own, as workers end where `sweep.json` is another than the one that they began with.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from plait.configs import codec
from plait.configs.components import validate
from plait.configs.files import write_atomically
from plait.train.sweep.runs import Run

GROWN = "grown.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
    """What a command added."""

    command: tuple[str, ...]
    """Words after `launch.py sweep`."""
    since: str
    commit: str | None
    """Of plait's source, with `-dirty` where `changes-N.diff` stands beside this file, of the N-th command that added runs."""
    versions: Mapping[str, str]
    runs: tuple[Run, ...]
    """The new ones."""


def growths(folder: Path) -> tuple[Growth, ...]:
    """Those of the sweep in `folder`, in order. Raises ValueError where the file cannot be used."""
    if not (folder / GROWN).exists():
        return ()
    found = codec.load(tuple[Growth, ...], folder / GROWN)
    for number, growth in enumerate(found):
        for index, run in enumerate(growth.runs):
            validate(run.config, f"{GROWN}: {number}.runs.{index}.config")
    return found


def write_growths(folder: Path, grown: Sequence[Growth], changes: str | None) -> None:
    """Writes all of them; `changes` are those of the code at the last. To be called by the owner of `folder`."""
    if changes:
        write_atomically(folder / f"changes-{len(grown)}.diff", changes)
    write_atomically(folder / GROWN, json.dumps(codec.encode(tuple(grown)), indent=1) + "\n")
