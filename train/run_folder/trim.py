"""A run folder cut back to a checkpoint's step."""

from pathlib import Path

import numpy as np

from plait.configs.files import write_atomically
from plait.train.run_folder.lines import EVENTS, METRICS, read_lines
from plait.train.run_folder.probe_files import ATTENTION, probe_files, step_of


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
    if attention.exists():
        with np.load(attention) as arrays:
            late = "step" in arrays and int(arrays["step"]) > step
        if late:
            attention.unlink()
            dropped += 1
    return dropped
