"""A run folder cut back to a checkpoint's step."""

import logging
from pathlib import Path

from plait.configs.files import write_atomically
from plait.train.run_folder.lines import EVENTS, METRICS, read_lines
from plait.train.run_folder.probe_files import ATTENTION, probe_files, read_npz, step_of

log = logging.getLogger(__name__)


def trim_metrics(run: Path, step: int) -> int:
    """How many lines and probe files later than `step` were dropped, so that a resumed run writes each exactly once.

    Metrics, events, probe files and the attention pictures of a later step go; what is at or before the step keeps its bytes.
    Each file is replaced atomically and a second call finds nothing to do, so a crash inside is repaired by calling again.
    """
    run, dropped = Path(run), 0
    for name in (METRICS, EVENTS):
        path = run / name
        lines, note = read_lines(path)
        kept = [raw for raw, record in lines if record["step"] <= step]
        if len(kept) < len(lines) or note:
            write_atomically(path, b"".join(kept))
            dropped += len(lines) - len(kept) + bool(note)
    for path in probe_files(run):
        if step_of(path) > step:
            path.unlink()
            dropped += 1
    attention = run / ATTENTION
    if attention.is_file() and _is_late(attention, step):
        attention.unlink()
        dropped += 1
    return dropped


def set_aside(run: Path) -> Path | None:
    """The new folder `unsaved-N` with the numbers of a run that begins anew, because it was killed before its first checkpoint; None
    where it has none. Nothing is dropped without a checkpoint to go back to."""
    run = Path(run)
    files = [*(run / name for name in (METRICS, EVENTS, ATTENTION)), *probe_files(run)]
    files = [path for path in files if path.exists() and path.stat().st_size]
    if not files:
        return None
    number = 1
    while (run / f"unsaved-{number}").exists():
        number += 1
    for path in files:
        target = run / f"unsaved-{number}" / path.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    log.warning("%s begins anew: no checkpoint was finished; what it had logged is in unsaved-%d", run, number)
    return run / f"unsaved-{number}"


def _is_late(attention: Path, step: int) -> bool:
    """Whether pictures are of a later step, or cannot be read: a run makes them at its end."""
    try:
        arrays = read_npz(attention)
    except ValueError as error:
        log.warning("%s: %s and is made again", attention.parent.parent, error)
        return True
    at = arrays.get("step")
    return at is not None and not (at.ndim == 0 and at.dtype.kind in "iu" and int(at) <= step)
