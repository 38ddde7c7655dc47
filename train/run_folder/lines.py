"""The lines of `metrics.jsonl` and `events.jsonl`."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plait.configs.files import parse_json

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


_RULE = "must be a JSON object with a step"
LATEST = 1 << 53
"""Steps lie below it, as numbers of JSON do that every reader takes for the same."""


def read_lines(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], str | None]:
    """The lines of a JSONL file, each as its bytes and its object, and a sentence about an unfinished last line.

    Raises:
      ValueError: it cannot be read, or a line other than an unfinished last one is not an object of the kind that the file holds.
    """
    try:
        chunks = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}; restore the file") from None
    lines: list[tuple[bytes, dict[str, Any]]] = []
    rules = _OF_EVENTS if path.name == EVENTS else None
    for number, chunk in enumerate(chunks, start=1):
        if not chunk.strip():
            continue
        try:
            record = parse_json(chunk)
            problem = _fits(record, rules)
        except ValueError as error:
            problem = f"{_RULE}: {error}"
        if problem is None:
            lines.append((chunk + b"\n", record))
        elif number == len(chunks):
            return lines, f"{path.name}: line {number} is unfinished (the run was killed while writing it) and was ignored"
        else:
            raise ValueError(f"{path}:{number}: {chunk[:80]!r} {problem}; delete the line or restore the file")
    return lines, None


def _fits(record: Any, rules: Mapping[str, str] | None = None) -> str | None:
    """Why a value is no line of a file in which names have these rules, else all the rule of a number; None where it is."""
    if not isinstance(record, dict) or not _RULES["an index"](record.get("step")):
        return _RULE
    for name, value in record.items():
        rule = "a number or null" if rules is None else rules.get(name)
        if rule is not None and not _RULES[rule](value):
            return f"must have {rule} as {name}"
    return None if rules is None or "kind" in record else "must have a kind"


_RULES: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "an index": lambda value: type(value) is int and 0 <= value < LATEST,
    "an index or null": lambda value: value is None or _RULES["an index"](value),
    "a number or null": lambda value: value is None or type(value) is float or (type(value) is int and abs(value) < LATEST**2),
}
_OF_EVENTS = {
    **dict.fromkeys(("kind", "message"), "text"),
    **dict.fromkeys(("layer", "head"), "an index or null"),
    **dict.fromkeys(("value", "threshold"), "a number or null"),
}


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
    absent = {"layer": None, "head": None, "value": None, "threshold": None, "message": ""}
    records = [{**absent, **record} for _, record in lines]
    return [{k: math.nan if v is None and k in ("value", "threshold") else v for k, v in record.items()} for record in records]


def series(records: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [N] and float values [N] of the metrics lines that carry `name`."""
    pairs = [(record["step"], record[name]) for record in records if name in record]
    steps, values = zip(*pairs) if pairs else ((), ())
    return np.asarray(steps, np.int64), np.asarray(values, np.float64)
