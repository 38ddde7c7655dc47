"""The lines of `metrics.jsonl` and `events.jsonl`."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


def strict(value: Any) -> Any:
    """A copy of a JSON tree in which every number that is not finite is None and array scalars are Python's."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def line(record: Mapping[str, Any]) -> bytes:
    """An object as a line of a JSONL file."""
    return json.dumps(strict(record), allow_nan=False).encode() + b"\n"


def read_lines(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], str | None]:
    """The lines of a JSONL file, each as its bytes and its object, and a sentence about an unfinished last line.

    Raises:
      ValueError: a line other than an unfinished last one is not a JSON object with a step.
    """
    if not path.exists():
        return [], None
    lines: list[tuple[bytes, dict[str, Any]]] = []
    chunks = path.read_bytes().split(b"\n")
    for number, chunk in enumerate(chunks, start=1):
        if not chunk.strip():
            continue
        try:
            record = json.loads(chunk)
            lines.append((chunk + b"\n", {**record, "step": int(record["step"])}))
        except (ValueError, TypeError, KeyError) as error:
            if number == len(chunks):
                return lines, f"{path.name}: line {number} is unfinished (the run was killed while writing it) and was ignored"
            rule = "must be a JSON object with a step"
            raise ValueError(f"{path}:{number}: {chunk[:80]!r} {rule}; delete the line or restore the file") from error
    return lines, None


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl` in order, null as NaN; logs a warning about an unfinished last line and skips it."""
    lines, note = read_lines(Path(run) / METRICS)
    if note:
        log.warning("%s: %s", run, note)
    return [{name: math.nan if value is None else value for name, value in record.items()} for _, record in lines]


def read_events(run: Path) -> list[dict[str, Any]]:
    """The lines of `events.jsonl` in order; a null value or threshold is NaN, a null layer or head means the whole model."""
    lines, note = read_lines(Path(run) / EVENTS)
    if note:
        log.warning("%s: %s", run, note)
    numbers = ("value", "threshold")
    return [{k: math.nan if v is None and k in numbers else v for k, v in record.items()} for _, record in lines]


def series(records: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [N] and float values [N] of the metrics lines that carry `name`."""
    pairs = [(record["step"], record[name]) for record in records if name in record]
    steps, values = zip(*pairs) if pairs else ((), ())
    return np.asarray(steps, np.int64), np.asarray(values, np.float64)
