"""The file of what a command found about a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.configs.files import first_new, read_json
from plait.train.remote.reading import give_back
from plait.train.run import write_json

log = logging.getLogger("plait")

ASKED = "asked"
"""Key of a file of results under which the options stand that they are of."""
_ALIKE = (ASKED, "corpus")


def check_new(field: str, path: Path | None) -> None:
    """Raises ValueError where a file that is asked for cannot be made, or is there: nothing that was saved is written over."""
    if path is not None and path.is_dir():
        raise ValueError(f"{field}={str(path)!r} is a folder; give a file")
    if path is not None and path.exists():
        raise ValueError(f"{field}={str(path)!r} is there already, and would be lost; give another file, or take it away")


def keep(results: Mapping[str, object], asked: Mapping[str, object], out: Path | None, usual: Path) -> None:
    """Writes results as JSON, with what was asked, to `out`, or to the usual file of the run, which may be where nobody can write.

    A file that is there stays, unless it is the usual one and holds results of the same options; NAME_2.json, NAME_3.json and so on
    follow it. So does what another process writes at the same time.

    Raises:
        OSError: `out` was asked for and cannot be written.
    """
    results = {**results, ASKED: json.loads(json.dumps(asked, default=str))}
    path = out or usual
    try:
        path = _written(path, results, own=out is None)
    except OSError as error:
        if out is not None:
            raise
        log.warning("%s cannot be written (%s): the results are shown only; --out FILE keeps them", path, error)
    else:
        if path not in (out, usual):
            log.warning("%s holds results of other options, and stays; these are in %s", out or usual, path)


def _written(wanted: Path, results: Mapping[str, object], *, own: bool) -> Path:
    """The file that now holds the results: the wanted one, or the first that follows it that is not there.

    Args:
        own: whether it is the run's, where one of the same options is written anew, and which may lie at an address.
    """
    asked = {key: results.get(key) for key in _ALIKE}

    def write(path: Path) -> None:
        try:
            write_json(path, results, new=True)
        except FileExistsError:
            if not own or (path.is_file() and {key: _held(path).get(key) for key in _ALIKE} != asked):
                raise
            write_json(path, results)
            give_back(path)
        else:
            if own and not give_back(path, new=True):
                path.unlink()
                raise FileExistsError(path)

    return first_new(wanted, write)


def _held(path: Path) -> Mapping[str, Any]:
    """What a file of results holds; nothing where it cannot be read."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
