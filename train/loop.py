"""Training from start or checkpoint to the end."""

from __future__ import annotations

import dataclasses
import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp

from plait.configs import codec
from plait.configs.experiment import ExperimentConfig
from plait.data.batch import Batch
from plait.kernels import chosen
from plait.models.mixers.stats import ProbeConfig
from plait.train import run as runs
from plait.train.checkpoint import Checkpoints
from plait.train.clock import Clock
from plait.train.evaluate import Evaluator, place
from plait.train.hardware import environment, peak_flops
from plait.train.mesh import batch_sharding
from plait.train.metrics import ATTENTION, MetricsWriter, ProgressLine, trim_metrics, write_layers, write_probes
from plait.train.probes.collect import describe_layers, probe_arrays, probe_metrics
from plait.train.probes.events import EventDetector
from plait.train.probes.pictures import write_pictures
from plait.train.state import TrainState
from plait.train.step import make_step

log = logging.getLogger("plait")


class TrainingFailed(RuntimeError):
    """A run that cannot go on."""


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
    going_on = runs.claim(config)
    setup = runs.set_up(config)
    folder = Path(config.folder)
    if not going_on:
        folder.mkdir(parents=True, exist_ok=True)
        codec.save(config, folder / runs.CONFIG)
    with _Termination() as termination:
        return _Loop(setup, folder, termination).run()


class _Loop:
    """A run in progress. Metrics of step n are read after step n + 1 is dispatched, so that reading never stalls the device."""

    def __init__(self, setup: runs.Setup, folder: Path, termination: _Termination):
        self.setup, self.folder, self.termination = setup, folder, termination
        config = self.config = setup.config
        self.layers = describe_layers(config.model)
        self.detector = EventDetector(self.layers)
        self.checkpoints = Checkpoints(folder / runs.CHECKPOINTS, keep_last=config.keep_last, keep_best=config.keep_best)
        self.evaluator = Evaluator(setup.blueprint, setup.mesh)
        self.iterator = setup.data.train()
        self.rows = batch_sharding(setup.mesh, config.data.batch_size, config.data.seq_len, config.optimizer.accumulate)
        peak = peak_flops(jax.devices()[0])
        self.step_flops = None if peak is None else 3 * config.model.flops(config.data.seq_len) / (peak * setup.mesh.size)
        self.tokens = 0
        self.latest: dict[str, float] = {}

    def run(self) -> Result:
        state, first, seconds = self._start()
        self.clock = Clock(seconds)
        config = self.config
        sinks = {"wandb": config.wandb is not None, "project": config.wandb or "plait", "config": codec.encode(config)}
        try:
            if first < config.steps:
                self._compile()
                self._write_facts()
            with (
                MetricsWriter(self.folder, resumed_at=first or None, **sinks) as self.writer,
                ProgressLine(config.steps, start_step=first) as self.progress,
            ):
                state, last = self._steps(state, first)
            if last == config.steps and not (self.folder / ATTENTION).exists():
                params = state.params if state.ema is None else state.ema
                sample = next(iter(self.setup.data.val or [next(self.iterator)]))
                write_pictures(self.folder, last, self.setup.blueprint, params, state.buffers, sample, self.setup.data.tokenizer)
            self.checkpoints.wait()
        finally:
            self.checkpoints.close()
            self.iterator.close()
        return Result(self.folder, last, last == config.steps, self.latest)

    def _start(self) -> tuple[TrainState, int, float]:
        """The state to go on from, its step, and the seconds spent before."""
        restored = self.checkpoints.restore(self.setup.like())
        step = 0 if restored is None else restored[0]
        trim_metrics(self.folder, step)
        if restored is None:
            return self.setup.fresh(), 0, 0.0
        _, state, extra = restored
        self.iterator.set_state(extra["data"])
        self.detector.load_state_dict(extra["events"])
        self.tokens = extra["tokens"]
        log.info("%s goes on from step %d", self.folder, step)
        return state, step, extra["seconds"]

    def _compile(self) -> None:
        """Both steps, ahead of time: compiling is then no part of any step's time, and its errors come before training."""
        log.info("compiling a step of %s parameters", f"{self.setup.blueprint.num_params:,}")
        shape = (self.config.data.batch_size, self.config.data.seq_len)
        kinds = Batch(*(jnp.int32,) * 4, jnp.float32)
        batch = Batch(*(jax.ShapeDtypeStruct(shape, kind, sharding=self.rows) for kind in kinds))

        def compiled(probe: ProbeConfig | None) -> Any:
            step = make_step(self.setup.blueprint, self.setup.tx, self.setup.mesh, probe)
            return (
                jax.jit(step, donate_argnums=0, out_shardings=(self.setup.shardings, None))
                .lower(self.setup.like(), batch)
                .compile()
            )

        self.plain_step = compiled(None)
        self.probe_step = self.plain_step if self.config.probe_every is None else compiled(self.config.probe)

    def _write_facts(self) -> None:
        """What a reader of the run folder wants to know about it."""
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
        self.clock.lap()
        while step < config.steps and not self.termination.asked:
            probing = config.probe_every is not None and (step == 0 or _due(step + 1, config.probe_every))
            batch = place(next(self.iterator), self.rows)
            state, metrics = (self.probe_step if probing else self.plain_step)(state, batch)
            step += 1
            self._read(pending)
            pending = (step, metrics)
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

    def _read(self, pending: tuple[int, dict[str, Any]] | None) -> None:
        """Takes in the metrics of a step, once the device has them."""
        if pending is None:
            return
        step, metrics = pending
        stats = metrics.pop("stats", None)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        tokens, bad = int(values.pop("tokens")), int(values.pop("bad_steps"))
        self.tokens += tokens
        self.clock.count(tokens)
        if bad >= self.config.optimizer.max_bad_steps:
            raise TrainingFailed(
                f"the last {bad} steps up to {step} had a loss or gradient that is not finite, optimizer.max_bad_steps="
                f"{self.config.optimizer.max_bad_steps}; parameters are those before them. Lower optimizer.learning_rate in a new run"
            )
        arrays = None if stats is None else probe_arrays(stats)
        events = self.detector.update(step, arrays, values["loss/train"])
        self.writer.write_events(events)
        for event in events:
            self.progress.message(f"step {step:,}: {event.message}")
        if arrays is not None:
            write_probes(self.folder, step, arrays)
            values |= probe_metrics(arrays)
        logging_now = _due(step, self.config.log_every) or step == self.config.steps
        if logging_now:
            values["time/step"], values["throughput/tokens_per_second"] = self.clock.lap()
            if self.step_flops is not None:
                values["throughput/mfu"] = values["throughput/tokens_per_second"] * self.step_flops
        if logging_now or arrays is not None:
            self._write(step, values)
            speed, mfu = self.latest.get("throughput/tokens_per_second"), self.latest.get("throughput/mfu")
            self.progress.update(step, loss=values["loss/train"], tokens_per_second=speed, mfu=mfu)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self.latest |= values
        self.writer.write(step, values, tokens=self.tokens, seconds=self.clock.seconds)

    def _evaluate(self, state: TrainState, step: int) -> float | None:
        """Validation loss after `step`, None where nothing is held out."""
        data = self.setup.data
        if not len(data.val):
            return None
        params = state.params if state.ema is None else state.ema
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
            "tokens": self.tokens,
            "seconds": self.clock.seconds,
        }
        self.checkpoints.save(step, state, extra, loss=loss)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class _Termination:
    """Notes SIGTERM and SIGINT, so that the step in progress is finished and saved. A second SIGINT interrupts at once."""

    asked = False

    def __enter__(self) -> _Termination:
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("%s: saving after this step, then stopping; --resume goes on", signal.Signals(number).name)
