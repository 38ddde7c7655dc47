"""What a run writes to its folder and shows while it trains: on host 0 only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plait.configs import codec
from plait.configs.experiment import ExperimentConfig
from plait.kernels import chosen
from plait.train import run as runs
from plait.train.pods.hosts import together
from plait.train.pods.hosts.hardware import environment
from plait.train.probes.collect import attention_by_kind
from plait.train.run_folder.contents import ENVIRONMENT
from plait.train.run_folder.probe_files import write_layers, write_probes
from plait.train.run_folder.writer import MetricsWriter
from plait.train.scoring.extent import measured
from plait.train.terminal.progress import ProgressLine
from plait.train.watching.watchers import Event


class Journal:
    """Metrics, events and probes of a run in progress."""

    def __init__(self, config: ExperimentConfig, check: Callable[[], None]):
        """Args: `config` with the model as it is trained; `check` raises before a write where the folder is no longer ours."""
        self.config, self.folder, self._check = config, Path(config.folder), check
        self.latest: dict[str, float] = {}
        """The last of each metric."""
        self._writer: MetricsWriter | None = None
        self._progress: ProgressLine | None = None

    @contextlib.contextmanager
    def open(self, first: int) -> Iterator[None]:
        """Written and shown inside, from step `first` on."""
        if not together.first():
            yield
            return
        self._check()
        config = self.config
        wandb = {"wandb": config.wandb is not None, "project": config.wandb or "plait", "config": codec.encode(config)}
        with (
            MetricsWriter(self.folder, resumed_at=first or None, **wandb) as self._writer,
            ProgressLine(config.steps, start_step=first) as self._progress,
        ):
            yield

    def facts(self, setup: runs.Setup, layers: Sequence[Mapping[str, Any]]) -> None:
        """What a reader of the run folder wants to know about the run, once its programs are compiled."""
        if not together.first():
            return
        self._check()
        facts = {
            **environment(),
            "kernels": chosen(),
            "num_params": setup.blueprint.num_params,
            **setup.blueprint.adapted(),
            "flops_per_token": self.config.model.flops(self.config.data.seq_len),
            "mesh": dict(setup.mesh.shape),
            "data": setup.data.summary(),
            "validation": measured(setup.data, self.config.eval_batches),
        }
        runs.write_json(self.folder / ENVIRONMENT, facts)
        write_layers(self.folder, layers, self.config.probe.first_k)

    def metrics(self, step: int, values: Mapping[str, float], *, tokens: int, seconds: float) -> None:
        """A line of metrics; `tokens` and `seconds` since the start of the run."""
        self.latest |= values
        if self._writer is not None:
            self._check()
            self._writer.write(step, values, tokens=tokens, seconds=seconds)

    def events(self, events: Iterable[Event]) -> None:
        """Writes and shows what happened."""
        if self._writer is not None:
            self._check()
            self._writer.write_events(events)
        for event in events:
            self.say(f"step {event.step:,}: {event.message}")

    def probes(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """The file of a probe step."""
        if together.first():
            self._check()
            write_probes(self.folder, step, arrays)

    def say(self, text: str) -> None:
        """Shows a sentence."""
        if self._progress is not None:
            self._progress.message(text)

    def stand(self, step: int) -> None:
        """Shows where training is."""
        if self._progress is not None:
            speed, mfu = self.latest.get("throughput/tokens_per_second"), self.latest.get("throughput/mfu")
            watched = attention_by_kind(self.latest)
            self._progress.update(step, loss=self.latest["loss/train"], tokens_per_second=speed, mfu=mfu, watched=watched)
