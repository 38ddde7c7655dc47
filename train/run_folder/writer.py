"""Metrics and events of a run as it trains: to its folder, TensorBoard and Weights & Biases."""

import io
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from plait.configs import codec
from plait.configs.files import write_atomically
from plait.train.run_folder.lines import EVENTS, METRICS, line, read_lines, strict

COMPARED = ("loss/val", "loss/bits_per_byte", "loss/train", "throughput/tokens_per_second")
"""Metrics by which TensorBoard's table compares runs."""


class MetricsWriter:
    """Appends metrics and events to a run folder and mirrors the scalars to TensorBoard and, when asked, Weights & Biases.

    To resume, call `trim_metrics(run, step)` first and pass the same step as `resumed_at`.

    Args:
      run: the run folder; made if missing.
      tensorboard: whether to write `tensorboard/`.
      wandb: whether to send scalars to Weights & Biases, in the project `project`.
      config: the config tree that TensorBoard (under HParams) and Weights & Biases show.
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
            if config is not None:
                for told in _hyperparameters(config):
                    self._tensorboard.file_writer.add_summary(told)

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
        """Appends one line for each event; an `Event` of `train.watchers` is written through its `to_dict`."""
        for event in events:
            self._append(self._events, event if isinstance(event, Mapping) else event.to_dict())

    @staticmethod
    def _append(file: io.BufferedWriter, record: Mapping[str, Any]) -> None:
        file.write(line(record))
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


def _hyperparameters(config: Mapping[str, Any]) -> Sequence[Any]:
    """What TensorBoard's table of runs is made of: the leaves of a config, and by which metrics runs are compared."""
    from tensorboardX.summary import hparams

    leaves = {path: leaf if isinstance(leaf, str | bool | int | float) else None for path, leaf in codec.leaves(config).items()}
    return hparams(leaves, dict.fromkeys(COMPARED))[:2]


def _start_wandb(run: Path, project: str, config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb=True needs the package wandb, which is not installed; pip install 'plait[wandb]'") from error
    name = run / "wandb_id"  # the same id after a resume goes on in the same curves
    if not name.exists():
        write_atomically(name, uuid.uuid4().hex[:12])
    try:
        found = name.read_text("utf-8")
    except (OSError, ValueError):
        found = ""
    if not re.fullmatch(r"[\w-]{1,64}", found):
        raise ValueError(
            f"{name} holds {found[:40]!r}, which is no id of Weights & Biases; delete it to go on in a curve of its own"
        )
    start = {"project": project, "name": run.name, "dir": str(run), "id": found, "resume": "allow"}
    return wandb.init(**start, config=strict(config or {}))
