"""The file of what a command found about a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from plait.train.remote.reading import give_back
from plait.train.run import write_json

log = logging.getLogger("plait")


def keep(results: Mapping[str, object], out: Path | None, usual: Path) -> None:
    """Writes results as JSON to `out`, or to the usual file of the run, which may be where nobody can write.

    Raises:
        OSError: `out` was asked for and cannot be written.
    """
    try:
        write_json(out or usual, results)
        if out is None:
            give_back(usual)
    except OSError as error:
        if out is not None:
            raise
        log.warning("%s cannot be written (%s): the results are shown only; --out FILE keeps them", usual, error)
