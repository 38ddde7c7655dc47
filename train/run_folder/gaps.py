"""What a run folder should hold up to a step and does not."""

import itertools
from pathlib import Path

from plait.train.run_folder.lines import EVENTS, METRICS, read_lines
from plait.train.run_folder.probe_files import probe_files, step_of


def gaps(run: Path, step: int, *, log_every: int, probe_every: int | None) -> list[str]:
    """Sentences about lines and files missing up to `step`, none where all are there.

    Args:
      log_every: steps between lines, the largest of what the run's sessions asked for.
      probe_every: steps between probe files, None where none are written.
    """
    run, found = Path(run), []
    logged = {record["step"] for _, record in read_lines(run / METRICS)[0]} | {0, step}
    holes = [(a + 1, b - 1) for a, b in itertools.pairwise(sorted(at for at in logged if at <= step)) if b - a > log_every]
    if holes:
        found.append(f"{METRICS} has no lines of steps {_ranges(holes)}")
    if step and not (run / EVENTS).exists():
        found.append(f"{EVENTS} is gone")
    if probe_every is not None:
        there = {step_of(path) for path in probe_files(run)}
        lost = [(at, at) for at in range(probe_every, step + 1, probe_every) if at not in there]
        if lost:
            found.append(f"probe files of steps {_ranges(lost)} are gone")
    return found


def _ranges(pairs: list[tuple[int, int]]) -> str:
    shown = ", ".join(f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in pairs[:3])
    return shown + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "")
