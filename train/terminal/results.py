"""The file of what a command found about a run."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.configs.files import read_json
from plait.train.remote.reading import give_back
from plait.train.run import write_json

log = logging.getLogger("plait")

ASKED = "asked"
"""Key of a file of results under which the options stand that they are of."""
_ALIKE = (ASKED, "corpus")


def keep(results: Mapping[str, object], asked: Mapping[str, object], out: Path | None, usual: Path) -> None:
    """Writes results as JSON, with what was asked, to `out`, or to the usual file of the run, which may be where nobody can write.

    A usual file that holds what was asked otherwise stays, and NAME_2.json, NAME_3.json and so on follow it.

    Raises:
        OSError: `out` was asked for and cannot be written.
    """
    results = {**results, ASKED: json.loads(json.dumps(asked, default=str))}
    path = out or _free(usual, results)
    try:
        write_json(path, results)
        if out is None:
            give_back(path)
    except OSError as error:
        if out is not None:
            raise
        log.warning("%s cannot be written (%s): the results are shown only; --out FILE keeps them", path, error)
    else:
        if path not in (out, usual):
            log.warning("%s holds results of other options, and stays; these are in %s", usual, path)


def _free(usual: Path, results: Mapping[str, object]) -> Path:
    """The first of the usual file and those that follow it that is not there, or holds results of the same options."""
    asked = {key: results.get(key) for key in _ALIKE}
    every = (usual if number == 1 else usual.with_name(f"{usual.stem}_{number}{usual.suffix}") for number in itertools.count(1))
    return next(path for path in every if not path.is_file() or {key: _held(path).get(key) for key in _ALIKE} == asked)


def _held(path: Path) -> Mapping[str, Any]:
    """What a file of results holds; nothing where it cannot be read."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
