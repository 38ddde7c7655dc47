"""What a run folder holds says what it is: nothing yet, a run to go on with, or a run that has lost a part."""

from __future__ import annotations

from pathlib import Path

from plait.train.run_folder.lines import EVENTS, METRICS
from plait.train.run_folder.probe_files import PROBES

CONFIG, ENVIRONMENT, CHECKPOINTS, ORIGIN = "config.json", "environment.json", "checkpoints", "origin.json"
BRANCH = "branch.json"
ORIGINALS = "published"
"""Folder that keeps the files beside the weights of a published model, for an export."""
MARK = "README.txt"
_MARKED = (
    "Checkpoints of the run in the folder above, one a step. This file was written before the first of them: where it is missing,\n"
    "--resume takes this folder for one that is not mounted, and does not begin the run anew.\n"
)


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


def begun(folder: Path) -> bool:
    """Whether a run has begun in `folder`. Raises RunError where it has and a part that it cannot go on without is gone."""
    there = [name for name in (ENVIRONMENT, METRICS, EVENTS, PROBES, CHECKPOINTS) if _is_filled(folder / name)]
    if not (folder / CONFIG).exists():
        if there:
            raise RunError(
                f"out={str(folder)!r} holds {', '.join(there)} of a run and no {CONFIG}: restore {CONFIG}, or use another --out"
            )
        return False
    checkpoints = folder / CHECKPOINTS
    if METRICS in there and not (any(_is_step(path) for path in _entries(checkpoints)) or _is_unused(checkpoints)):
        what = "holds none that is whole" if CHECKPOINTS in there else "is empty" if checkpoints.exists() else "is not there"
        raise RunError(
            f"out={str(folder)!r} holds {METRICS} of a run and {CHECKPOINTS}/ {what}: bring it back (is it mounted?), or use another --out; "
            "to begin anew, delete the folder"
        )
    return True


def mark(folder: Path) -> None:
    """Makes `checkpoints/` tell from now on that it is this run's, even before it holds one."""
    path = folder / CHECKPOINTS / MARK
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_MARKED)


def _is_filled(path: Path) -> bool:
    if path.is_dir():
        return any(entry.name != MARK for entry in _entries(path))
    return path.exists() and path.stat().st_size > 0


def _is_unused(checkpoints: Path) -> bool:
    """Whether this run has finished no checkpoint there: what was being written when it was killed is none."""
    return (checkpoints / MARK).exists() and not any(path.name.startswith("damaged-") for path in _entries(checkpoints))


def _is_step(path: Path) -> bool:
    return path.name.isdecimal()


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
