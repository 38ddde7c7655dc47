"""Training from start or checkpoint to the end."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from plait.configs import codec
from plait.configs.experiment import ExperimentConfig
from plait.kernels import chosen
from plait.kernels.chips import peak_flops
from plait.train import run as runs
from plait.train.checkpoint import Checkpoints
from plait.train.clock import Clock
from plait.train.evaluate import Evaluator
from plait.train.pods.hosts import heartbeat, together
from plait.train.pods.hosts.failure import TrainingFailed
from plait.train.pods.hosts.hardware import environment
from plait.train.pods.hosts.spread import Spread
from plait.train.pods.hosts.termination import Termination
from plait.train.probes.base import Probes
from plait.train.probes.collect import describe_layers, probe_arrays, probe_metrics
from plait.train.probes.events import Event, EventDetector
from plait.train.probes.pictures import write_pictures
from plait.train.progress import ProgressLine
from plait.train.run_folder.probe_files import ATTENTION, write_layers, write_probes
from plait.train.run_folder.trim import trim_metrics
from plait.train.run_folder.writer import MetricsWriter
from plait.train.spikes import Rewind, SpikeWatch
from plait.train.state import TrainState

log = logging.getLogger("plait")


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    folder: Path
    step: int
    finished: bool
    """False when a signal ended it; a resumed run goes on from `step`."""
    metrics: dict[str, float]
    """The last of each metric."""


def train(config: ExperimentConfig) -> Result:
    """Trains in `config.folder` and returns when the last step is saved, or after saving on SIGTERM.

    Raises:
        ValueError: the config, data or run folder cannot be used (before anything is compiled).
        TrainingFailed: too many non-finite steps in a row.
    """
    going_on = runs.meet(config)
    setup = runs.set_up(config)
    folder = Path(config.folder)
    with together.together("run folder"):
        if together.first() and not going_on:
            folder.mkdir(parents=True, exist_ok=True)
            codec.save(config, folder / runs.CONFIG)
    with Termination() as termination:
        return _Loop(setup, folder, termination).run()


class _Loop:
    """A run in progress. Metrics of step n are read after step n + 1 is dispatched, so that reading never stalls the device."""

    def __init__(self, setup: runs.Setup, folder: Path, termination: Termination):
        self.setup, self.folder, self.termination = setup, folder, termination
        config = self.config = setup.config
        self.layers = describe_layers(config.model)
        self.detector = EventDetector(self.layers)
        self.spikes = SpikeWatch(config.spike)
        self.checkpoints = Checkpoints(folder / runs.CHECKPOINTS, keep_last=config.keep_last, keep_best=config.keep_best)
        self.evaluator = Evaluator(setup.blueprint, setup.mesh)
        self.iterator = setup.data.train()
        self.spread = Spread()
        peak = peak_flops(jax.devices()[0])
        self.step_flops = None if peak is None else 3 * config.model.flops(config.data.seq_len) / (peak * setup.mesh.size)
        self.tokens = 0
        self.latest: dict[str, float] = {}

    def run(self) -> Result:
        state, first, seconds = self._start()
        self.clock = Clock(seconds)
        try:
            with _peers_lost():
                if first < self.config.steps:
                    with heartbeat.phase("compile"):
                        self._compile()
                    self._write_facts()
                state, last = self._until_the_end(state, first)
                with heartbeat.phase("end"):
                    if last == self.config.steps:
                        self._picture(state, last)
                    self.checkpoints.wait()
        finally:
            self.checkpoints.close()
            self.iterator.close()
        return Result(self.folder, last, last == self.config.steps, self.latest)

    def _until_the_end(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        """Steps from `step` on, with what has to be done again after spikes."""
        events: list[Event] = []
        while True:
            with self._sinks(step):
                self._report(events)
                try:
                    return self._steps(state, step)
                except Rewind as spike:
                    cause, position = spike, spike.step + self.iterator.step - self.dispatched
            rewinds = self.spikes.rewinds + 1
            if rewinds > self.config.spike.max_rewinds:
                raise TrainingFailed(
                    f"{cause}, after spike.max_rewinds={rewinds - 1} rewinds; lower optimizer.learning_rate in a new run"
                )
            with heartbeat.phase("rewind"):
                self.checkpoints.wait()
                back = self.checkpoints.rewind(cause.step, self.config.checkpoint_every)
                if back is None:
                    raise TrainingFailed(f"{cause}, and there is no checkpoint to go back to")
                state, step, _ = self._start(back)
            skipped = position - self.iterator.step
            self.iterator.set_state({**self.iterator.get_state(), "step": position})
            self.spikes.rewinds = rewinds
            text = f"{cause}: back to step {step:,}, leaving out the {skipped:,} batches since (rewind {rewinds})"
            events = [Event(step + 1, "rewind", None, None, float(cause.step), float(rewinds), text)]

    @contextlib.contextmanager
    def _sinks(self, first: int) -> Iterator[None]:
        """Where metrics go and progress is shown: on host 0 only."""
        self.writer: MetricsWriter | Nowhere = Nowhere()
        self.progress: ProgressLine | Nowhere = Nowhere()
        if not together.first():
            yield
            return
        config = self.config
        sinks = {"wandb": config.wandb is not None, "project": config.wandb or "plait", "config": codec.encode(config)}
        with (
            MetricsWriter(self.folder, resumed_at=first or None, **sinks) as self.writer,
            ProgressLine(config.steps, start_step=first) as self.progress,
        ):
            yield

    def _picture(self, state: TrainState, last: int) -> None:
        if together.decide("end", (self.folder / ATTENTION).exists):
            return
        params = state.params if state.ema is None else state.ema
        data = self.setup.data
        write_pictures(
            self.folder, last, self.setup.blueprint, self.setup.mesh, params, state.buffers, data.whole(), data.tokenizer
        )

    def _start(self, at: int | None = None) -> tuple[TrainState, int, float]:
        """The state to go on from (the newest, or that of step `at`), its step, and the seconds spent before."""
        restored = self.checkpoints.restore(self.setup.like, at)
        step = 0 if restored is None else restored[0]
        with together.together("run folder"):
            if together.first():
                trim_metrics(self.folder, step)
        if restored is None:
            return self.setup.fresh(), 0, 0.0
        _, state, extra = restored
        self.iterator.set_state(extra["data"])
        self.detector.load_state_dict(extra["events"])
        if "spikes" in extra:  # a checkpoint from before there was a spike rule has none
            self.spikes.load_state_dict(extra["spikes"])
        self.tokens = extra["tokens"]
        log.info("%s goes on from step %d", self.folder, step)
        return state, step, extra["seconds"]

    def _compile(self) -> None:
        """Both steps, ahead of time: compiling is then no part of any step's time, and its errors come before training."""
        log.info("compiling a step of %s parameters", f"{self.setup.blueprint.num_params:,}")
        self.plain_step = self.setup.lower().compile()
        self.probe_step = (
            self.plain_step if self.config.probe_every is None else self.setup.lower(Probes(self.config.probe)).compile()
        )

    def _write_facts(self) -> None:
        """What a reader of the run folder wants to know about it."""
        if not together.first():
            return
        facts = {
            **environment(),
            "kernels": chosen(),
            "num_params": self.setup.blueprint.num_params,
            "flops_per_token": self.config.model.flops(self.config.data.seq_len),
            "mesh": dict(self.setup.mesh.shape),
            "data": self.setup.data.summary(),
        }
        runs.write_json(self.folder / runs.ENVIRONMENT, facts)
        write_layers(self.folder, self.layers, self.config.probe.first_k)

    def _steps(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        config, pending = self.config, None
        self.dispatched = step
        self.clock.lap()
        while step < config.steps and not self.termination.asked:
            probing = config.probe_every is not None and (step == 0 or _due(step + 1, config.probe_every))
            with self.clock.waiting("data"):
                batch = next(self.iterator)
            state, metrics = (self.probe_step if probing else self.plain_step)(
                state, self.setup.layout.place(batch), *self._bounds(step + 1)
            )
            step += 1
            self.dispatched = step
            self._read(pending)
            pending = (step, metrics)
            self.termination.look(step)
            last = step == config.steps or self.termination.asked
            evaluating = step == config.steps or _due(step, config.eval_every)
            if last or evaluating or _due(step, config.checkpoint_every):
                self._read(pending)
                pending = None
                with self.clock.paused():
                    loss = self._evaluate(state, step) if evaluating else None
                    if last or _due(step, config.checkpoint_every):
                        self._save(state, step, loss)
        self._read(pending)
        if self.termination.asked:  # it may have come after the step looked, as while validating
            self._save(state, step, None)
        return state, step

    def _bounds(self, step: int) -> list[np.ndarray]:
        """What the step takes beside state and batch."""
        return [] if self.config.spike.sigma is None else [self.spikes.bounds(step)]

    def _read(self, pending: tuple[int, dict[str, Any]] | None) -> None:
        """Takes in the metrics of a step, once the device has them."""
        if pending is None:
            return
        step, metrics = pending
        stats = metrics.pop("statistics", None)
        with self.clock.waiting("devices"):
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        heartbeat.step(step)
        tokens, bad = int(values.pop("tokens")), int(values.pop("bad_steps"))
        self.tokens += tokens
        self.clock.count(tokens)
        if bad >= self.config.optimizer.max_bad_steps:
            raise TrainingFailed(
                f"the last {bad} steps up to {step} had a loss or gradient that is not finite or a spike, optimizer.max_bad_steps="
                f"{self.config.optimizer.max_bad_steps}; parameters are those before them. Lower optimizer.learning_rate in a new run"
            )
        arrays = None if stats is None else probe_arrays(stats)
        spike = self.spikes.note(step, values["loss/train"], values["grad/norm"])
        every = self.config.checkpoint_every
        if spike is not None and self.config.spike.action == "rewind" and every is not None and step > every:
            raise Rewind(step, spike)
        events = self.detector.update(step, arrays, values["loss/train"])
        if spike is not None:
            text = f"{spike}: its update was left out"
            events.append(
                Event(step, "spike_skipped", None, None, values["loss/train"], float(self.spikes.bounds(step)[0]), text)
            )
        self._report(events)
        if arrays is not None:
            if together.first():
                write_probes(self.folder, step, arrays)
            values |= probe_metrics(arrays)
        logging_now = _due(step, self.config.log_every) or step == self.config.steps
        if logging_now:
            lap = self.clock.lap()
            values |= {"time/step": lap.step, "throughput/tokens_per_second": lap.tokens_per_second, "time/data": lap.data}
            values |= self.spread.report(step, lap)
            if self.step_flops is not None:
                values["throughput/mfu"] = values["throughput/tokens_per_second"] * self.step_flops
            if self.config.spike.sigma is not None:
                values["optimizer/rewinds"] = float(self.spikes.rewinds)
        if logging_now or arrays is not None:
            self._write(step, values)
            speed, mfu = self.latest.get("throughput/tokens_per_second"), self.latest.get("throughput/mfu")
            self.progress.update(step, loss=values["loss/train"], tokens_per_second=speed, mfu=mfu)

    def _report(self, events: Sequence[Event]) -> None:
        self.writer.write_events(events)
        for event in events:
            self.progress.message(f"step {event.step:,}: {event.message}")

    def _write(self, step: int, values: dict[str, float]) -> None:
        self.latest |= values
        self.writer.write(step, values, tokens=self.tokens, seconds=self.clock.seconds)

    def _evaluate(self, state: TrainState, step: int) -> float | None:
        """Validation loss after `step`, None where nothing is held out."""
        data = self.setup.data
        if not len(data.val):
            return None
        params = state.params if state.ema is None else state.ema
        with heartbeat.phase("evaluate"):
            found = self.evaluator(params, state.buffers, data.val, data.tokenizer, self.config.eval_batches)
        self._write(step, found.metrics())
        self.progress.message(f"step {step:,}: validation loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits per byte")
        return found.loss

    def _save(self, state: TrainState, step: int, loss: float | None) -> None:
        if step in self.checkpoints.steps():
            return
        extra = {
            "data": self.iterator.get_state(),
            "events": self.detector.state_dict(),
            "spikes": self.spikes.state_dict(),
            "tokens": self.tokens,
            "seconds": self.clock.seconds,
        }
        with heartbeat.phase("save"):
            self.checkpoints.save(step, state, extra, loss=loss)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class Nowhere:
    """Takes what host 0 writes and shows, on the other hosts."""

    def write(self, step: int, values: Mapping[str, float], *, tokens: int, seconds: float) -> None:
        """Nothing."""

    def write_events(self, events: Iterable[Any]) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def update(self, step: int, **values: float | None) -> None:
        """Nothing."""


@contextlib.contextmanager
def _peers_lost() -> Iterator[None]:
    """What a collective raises when a host is gone is no bad input."""
    try:
        yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        if together.count() == 1:
            raise
        raise TrainingFailed(f"host {together.index()} of {together.count()} cannot go on: {str(error)[:1000]}") from error
