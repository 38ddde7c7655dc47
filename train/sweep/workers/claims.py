"""Which worker has which run, and how runs ended: a folder a run, on any file system that the workers share.

claims/NAME/owner/         the worker, its process and machine, renewed while it lives (`plait.train.run_folder.owner`)
claims/NAME/outcome.json   how the run ended the last time, written by its worker
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from plait.configs import codec
from plait.configs.files import write_atomically
from plait.train.run_folder.contents import CONFIG
from plait.train.run_folder.lines import METRICS, read_lines, strict
from plait.train.run_folder.owner import Record, last_owner
from plait.train.sweep.runs import Run, SweepError

CLAIMS, RUNS, OUTCOME = "claims", "runs", "outcome.json"

Status = Literal["queued", "running", "interrupted", "failed", "stopped", "pruned", "done"]
"""`interrupted` has no worker and goes on from its checkpoint; `failed` is tried again by the same command; an event ended what is
`stopped`, and others' results what is `pruned`, and they stay so."""
OVER = ("done", "stopped", "pruned")
"""Nothing more is done about these."""
ENDED = ("done", "stopped")
"""These have results that can be compared with others'; a pruned run's are of a step before the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    status: Literal["done", "stopped", "pruned", "failed"]
    error: str | None = None
    """Why it failed."""
    why: str | None = None
    """What others had reached, or the event of the run, where that ended it."""
    failures: int = 0
    """How often it has, this time included."""
    step: int = 0
    seconds: float = 0.0
    """Of training, in all its sessions."""
    host: str = dataclasses.field(default_factory=platform.node)
    metrics: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    """The last of each."""


def claim(folder: Path, run: Run) -> Path:
    """The folder to be owned by the worker that has the run."""
    return folder / CLAIMS / run.name


def run_folder(folder: Path, run: Run) -> Path:
    """Where the run itself is."""
    return folder / RUNS / run.name


def outcome(folder: Path, run: Run) -> Outcome | None:
    """How the run ended the last time; None where it has not. Raises SweepError where that cannot be read."""
    path = claim(folder, run) / OUTCOME
    try:
        return codec.load(Outcome, path) if path.exists() else None
    except ValueError as error:
        raise SweepError(f"{error}; or delete it: the same command then goes on from the run's own folder") from None


def write_outcome(folder: Path, run: Run, found: Outcome) -> None:
    """Says how the run ended. To be called by its owner."""
    write_atomically(claim(folder, run) / OUTCOME, json.dumps(strict(codec.encode(found)), indent=1) + "\n")


def failures(folder: Path, runs: Sequence[Run]) -> dict[str, int]:
    """By run, how often each has failed."""
    found = {run.name: outcome(folder, run) for run in runs}
    return {name: 0 if one is None else one.failures for name, one in found.items()}


def failed(folder: Path, run: Run, error: str) -> Outcome:
    """The outcome of a run that has failed once more."""
    return Outcome(status="failed", error=error, failures=failures(folder, [run])[run.name] + 1, **progress(folder, run))


def first_with_error(folder: Path, runs: Sequence[Run], run: Run, before: Mapping[str, int]) -> Run:
    """The first of the runs, by whichever workers, that failed with the error of `run`, whose outcome has been written.

    Args:
        before: by run, how often it had failed when that began to count.
    """

    def told(one: Run) -> tuple[str, int] | None:
        """Its error, but for its name, and when it was written."""
        try:
            found, at = outcome(folder, one), (claim(folder, one) / OUTCOME).stat().st_mtime_ns
        except (OSError, SweepError):  # none, or of another that is removed or damaged meanwhile
            return None
        if found is None or found.error is None or found.failures <= before.get(one.name, 0):
            return None
        return found.error.replace(one.name, ""), at

    own = told(run)
    alike = [(each[1], one.name, one) for one in runs if own and (each := told(one)) and each[0] == own[0]]
    return min(alike, key=lambda x: x[:2])[2] if alike else run


def holder(folder: Path, run: Run) -> Record | None:
    """The worker that has the run, as far as that is known here without waiting; None where none has, or it is dead."""
    found = last_owner(claim(folder, run))
    return None if found is None or found.left or found.dead else found


def status(folder: Path, run: Run) -> Status:
    """How it stands with the run."""
    found = outcome(folder, run)
    if found is not None and found.status in OVER:
        return found.status
    if holder(folder, run) is not None:
        return "running"
    if found is not None:
        return found.status
    return "interrupted" if (run_folder(folder, run) / CONFIG).exists() else "queued"


def progress(folder: Path, run: Run) -> dict[str, Any]:
    """How far a run has come, as its own metrics tell: step and seconds."""
    last = latest(folder, run)
    return {"step": int(last.get("step", 0)), "seconds": float(last.get("seconds", 0.0))}


def latest(folder: Path, run: Run) -> dict[str, Any]:
    """The last of each metric of a run, with its last step, tokens and seconds; empty where there is nothing that can be read."""
    try:
        lines = read_lines(run_folder(folder, run) / METRICS)[0]
    except ValueError:
        return {}
    return {name: value for _, line in lines for name, value in line.items()}


def logged(folder: Path, run: Run, name: str) -> list[tuple[int, float | None]]:
    """Steps and values of a metric of a run, None where it was no number; empty where there is nothing that can be read."""
    try:
        lines = read_lines(run_folder(folder, run) / METRICS)[0]
    except ValueError:
        return []
    return [(int(line["step"]), line[name]) for _, line in lines if name in line]
