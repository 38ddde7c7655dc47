"""A run folder's numbers: metrics, events and probe arrays, written while training and read by the report.

    metrics.jsonl             one object a line: step, tokens, seconds, then group/name values
    events.jsonl              one object a line: step, kind, layer, head, value, threshold, message
    probes/layers.json        what each layer is (index, mixer, kind, num_heads) and first_k
    probes/step_00000050.npz  float32 arrays [L], [L, H] or [L, H, K], padded with NaN to the widest layer
    probes/attention.npz      attention pictures of one held-out text: maps [L, H, T, T] float16, tokens [T], step
    tensorboard/              the same scalars for TensorBoard

Every file is strict JSON or NumPy: a value that is not finite is written as null and read back as NaN. Lines are appended and
flushed one at a time; whole files are written beside their final name and renamed, so a killed run leaves nothing half written
but, at worst, one unfinished last line, which readers skip and say so.
"""

import io
import json
import logging
import math
import uuid
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from plait.configs.files import write_atomically

log = logging.getLogger(__name__)

METRICS, EVENTS, PROBES = "metrics.jsonl", "events.jsonl", "probes"
LAYERS, ATTENTION = f"{PROBES}/layers.json", f"{PROBES}/attention.npz"
CLOCK = ("step", "tokens", "seconds")  # what every metrics line starts with


def strict(value: Any) -> Any:
    """A copy of a JSON tree in which every number that is not finite is None and array scalars are Python's."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: Mapping[str, Any]) -> bytes:
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
        if _step_of(path) > step:
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


class MetricsWriter:
    """Appends metrics and events to a run folder and mirrors the scalars to TensorBoard and, when asked, Weights & Biases.

    To resume, call `trim_metrics(run, step)` first and pass the same step as `resumed_at`.

    Args:
      run: the run folder; made if missing.
      tensorboard: whether to write `tensorboard/`.
      wandb: whether to send scalars to Weights & Biases, in the project `project`.
      config: the config tree that Weights & Biases shows.
      resumed_at: step of the checkpoint the run goes on from; hides later points of an earlier TensorBoard file.
    Raises:
      ValueError: `wandb` is asked for and the package is not installed.
    """

    def __init__(
        self,
        run: Path,
        *,
        tensorboard: bool = True,
        wandb: bool = False,
        project: str = "plait",
        config: Mapping[str, Any] | None = None,
        resumed_at: int | None = None,
    ):
        self.run = Path(run)
        self.run.mkdir(parents=True, exist_ok=True)
        self._wandb = _start_wandb(self.run, project, config) if wandb else None
        for name in (METRICS, EVENTS):
            _end_last_line(self.run / name)
        self._metrics = (self.run / METRICS).open("ab")
        self._events = (self.run / EVENTS).open("ab")
        self._tensorboard = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            purge = None if resumed_at is None else resumed_at + 1
            self._tensorboard = SummaryWriter(str(self.run / "tensorboard"), purge_step=purge)

    def write(self, step: int, values: Mapping[str, float], *, tokens: int, seconds: float) -> None:
        """Appends one line: `step`, `tokens` and `seconds` since the start of the run, then the `group/name` values."""
        bad = next((name for name in values if "/" not in name), None)
        if bad is not None:
            raise ValueError(f"metric {bad!r} must be named group/name; use for example 'train/{bad}'")
        scalars = {name: float(value) for name, value in values.items()}
        self._append(self._metrics, {"step": int(step), "tokens": int(tokens), "seconds": float(seconds), **scalars})
        for name, value in scalars.items():
            if self._tensorboard:
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log({**scalars, "tokens": tokens}, step=step)

    def write_events(self, events: Iterable[Any]) -> None:
        """Appends one line for each event; an `Event` of `train.probes.events` is written through its `to_dict`."""
        for event in events:
            self._append(self._events, event if isinstance(event, Mapping) else event.to_dict())

    @staticmethod
    def _append(file: io.BufferedWriter, record: Mapping[str, Any]) -> None:
        file.write(_line(record))
        file.flush()

    def close(self) -> None:
        """Ends every sink; calling it again does nothing."""
        self._metrics.close()
        self._events.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()
        self._tensorboard = self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end_last_line(path: Path) -> None:
    """Makes the file end after a whole line, so that the next one does not join an unfinished one."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        write_atomically(path, b"".join(raw for raw, _ in read_lines(path)[0]))


def _start_wandb(run: Path, project: str, config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb=True needs the package wandb, which is not installed; pip install 'plait[wandb]'") from error
    name = run / "wandb_id"  # the same id after a resume goes on in the same curves
    if not name.exists():
        write_atomically(name, uuid.uuid4().hex[:12])
    start = {"project": project, "name": run.name, "dir": str(run), "id": name.read_text(), "resume": "allow"}
    return wandb.init(**start, config=strict(config or {}))


@dataclass(frozen=True)
class ProbeSeries:
    """The probe files of a run: `arrays[name]` is float32 [N, L, ...] over the N `steps`, NaN where a file had no value."""

    steps: np.ndarray
    arrays: dict[str, np.ndarray]
    layers: list[dict[str, Any]] = field(default_factory=list)
    first_k: int = 0
    notes: list[str] = field(default_factory=list)
    """Sentences about files that could not be read."""


def write_layers(run: Path, layers: Sequence[Mapping[str, Any]], first_k: int) -> None:
    """Writes `probes/layers.json`: for each layer its index, mixer, kind (linear, full or sparse) and num_heads."""
    tree = {"layers": [dict(layer) for layer in layers], "first_k": first_k}
    write_atomically(Path(run) / LAYERS, json.dumps(strict(tree), indent=1, allow_nan=False))


def write_probes(run: Path, step: int, probes: Mapping[str, np.ndarray]) -> Path:
    """The path of the new `probes/step_*.npz`, which holds each array as float32."""
    path = Path(run) / PROBES / f"step_{step:08d}.npz"
    _write_npz(path, {name: np.asarray(value, np.float32) for name, value in probes.items()})
    return path


def write_attention(run: Path, step: int, maps: np.ndarray, tokens: Sequence[str]) -> Path:
    """The path of `probes/attention.npz`: implied attention [L, H, T, T] as float16, its T token strings, and the step."""
    path = Path(run) / ATTENTION
    arrays = {"maps": np.asarray(maps, np.float16), "tokens": np.asarray(list(tokens), np.str_), "step": np.asarray(step)}
    _write_npz(path, arrays)
    return path


def read_probes(run: Path) -> ProbeSeries:
    """Every probe file of a run, stacked over steps; a file that cannot be read is left out and named in `notes`."""
    run, notes, files = Path(run), [], {}
    for path in probe_files(run):
        try:
            with np.load(io.BytesIO(path.read_bytes())) as arrays:
                files[_step_of(path)] = {name: np.asarray(arrays[name], np.float32) for name in arrays.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            notes.append(f"{path.name} cannot be read ({error}) and was ignored")
    for note in notes:
        log.warning("%s: %s", run, note)
    tree = json.loads((run / LAYERS).read_text()) if (run / LAYERS).exists() else {}
    names = dict.fromkeys(name for arrays in files.values() for name in arrays)
    stacked = {name: _stack([arrays.get(name) for arrays in files.values()]) for name in names}
    return ProbeSeries(np.asarray(list(files), np.int64), stacked, tree.get("layers", []), tree.get("first_k", 0), notes)


def probe_files(run: Path) -> list[Path]:
    """The files `probes/step_*.npz` of a run in the order of their steps."""
    return sorted((Path(run) / PROBES).glob("step_*.npz"), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def _stack(arrays: Sequence[np.ndarray | None]) -> np.ndarray:
    """Arrays of one rank stacked along a new first axis, padded with NaN to the widest; None becomes NaN."""
    shapes = [array.shape for array in arrays if array is not None]
    stacked = np.full((len(arrays), *np.max(shapes, axis=0)), np.nan, np.float32)
    for row, array in zip(stacked, arrays):
        if array is not None:
            row[tuple(slice(size) for size in array.shape)] = array
    return stacked


def format_seconds(seconds: float) -> str:
    """A duration in its two largest units: 45s, 3m 20s, 1h 02m, 2d 05h; a dash when it is not known."""
    if not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    for size, unit, next_size, next_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // next_size:02d}{next_unit}"
    return f"{whole}s" if seconds >= 1 or seconds == 0 else f"{seconds:.2g}s"


class ProgressLine:
    """Where training stands: one live line on a terminal, plain lines at least `interval_seconds` apart elsewhere."""

    def __init__(self, steps: int, *, start_step: int = 0, interval_seconds: float = 10.0, console: Console | None = None):
        self.steps, self.interval_seconds = steps, interval_seconds
        self.console = console or Console(soft_wrap=True)
        self._recent: deque[tuple[float, int]] = deque([(monotonic(), start_step)], maxlen=32)
        self._printed = -math.inf
        self._live: Progress | None = None
        if self.console.is_terminal:
            facts = TextColumn("{task.fields[facts]}", markup=False, style="none")
            self._live = Progress(BarColumn(24), facts, console=self.console, refresh_per_second=4)
            self._task = self._live.add_task("train", total=steps, completed=start_step, facts="compiling")
            self._live.start()

    def update(self, step: int, *, loss: float, tokens_per_second: float | None = None, mfu: float | None = None) -> None:
        """Shows step `step` of `steps`, its loss, the speed, the model FLOP utilisation (0..1) if known, and the time left."""
        now = monotonic()
        self._recent.append((now, step))
        facts = [f"step {step:,}/{self.steps:,}", f"loss {loss:.4f}"]
        if tokens_per_second is not None and math.isfinite(tokens_per_second):
            facts.append(f"{tokens_per_second:,.0f} tok/s")
        if mfu is not None and math.isfinite(mfu):
            facts.append(f"MFU {mfu:.1%}")
        facts.append(f"left {format_seconds(self._seconds_left())}")
        line = "  ".join(facts)
        if self._live:
            self._live.update(self._task, completed=step, facts=line)
        elif now - self._printed >= self.interval_seconds or step >= self.steps:
            self._printed = now
            self.message(line)

    def _seconds_left(self) -> float:
        """Time of the remaining steps at the speed of the last updates; the oldest kept is dropped first, compiling with it."""
        (start, first), (end, last) = self._recent[min(1, len(self._recent) - 2)], self._recent[-1]
        return (end - start) / (last - first) * (self.steps - last) if last > first else math.nan

    def message(self, text: str) -> None:
        """Prints a line of its own, above the live line where there is one."""
        self.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leaves the last state on the screen and gives the terminal back."""
        if self._live:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
