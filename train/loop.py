"""Training from start or checkpoint to the end."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from plait.configs import codec
from plait.configs.components import at
from plait.configs.experiment import ExperimentConfig
from plait.kernels.chips import peak_flops
from plait.train import origin as origins
from plait.train import run as runs
from plait.train.by_source import Meter, Validation, told_by_source
from plait.train.checkpoint import CheckpointError, Checkpoints
from plait.train.clock import Clock
from plait.train.pods.hosts import heartbeat, together
from plait.train.pods.hosts.failure import TrainingFailed
from plait.train.pods.hosts.spread import Spread
from plait.train.pods.hosts.termination import Termination
from plait.train.probes.base import Probes
from plait.train.probes.collect import describe_layers, probe_arrays, probe_metrics, told
from plait.train.probes.pictures import write_pictures
from plait.train.run_folder import contents
from plait.train.run_folder.branch import begins_other_data
from plait.train.run_folder.gaps import gaps
from plait.train.run_folder.probe_files import ATTENTION
from plait.train.run_folder.trim import set_aside, trim_metrics
from plait.train.state import Arrays, TrainState
from plait.train.watching.actions import Actions, Rewind, check_told, watchers_of
from plait.train.watching.journal import Journal
from plait.train.watching.spikes import SpikeWatch
from plait.train.watching.watchers import Event, Memory, load_states, states
from plait.train.whole_rows import whole_rows

log = logging.getLogger("plait")


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    folder: Path
    step: int
    finished: bool
    """False when a signal or an event ended it; a resumed run goes on from `step`."""
    metrics: dict[str, float]
    """The last of each metric."""
    by_event: bool = False
    """Whether it was an event that ended it."""
    judged: str | None = None
    """Why the judge ended it, where it has."""


class Judge(Protocol):
    """Says whether a run goes on, by what is known outside it."""

    @property
    def steps(self) -> Collection[int]:
        """Those after which it is asked."""

    def __call__(self, step: int, metrics: Mapping[str, float], /) -> str | None:
        """Why the run ends after a step; None where it goes on. `metrics` are the last of each."""


def train(config: ExperimentConfig, judge: Judge | None = None) -> Result:
    """Trains in `config.folder` and returns when the last step is saved, or after saving on SIGTERM or where an event or the judge stops it.

    Args:
        judge: asked on each host; it must tell all the same.

    Raises:
        ValueError: the config, data or run folder cannot be used, or it is in use (before anything is compiled).
        TrainingFailed: too many non-finite steps in a row, or another process has taken the run folder over.
    """
    observer = None if config.probe_every is None else Probes(config.probe)
    watchers_of(config, () if observer is None else observer.probes)
    config = origins.settled(config)
    config = dataclasses.replace(config, model=at("model", config.model.kept))
    with runs.claimed(config) as (going_on, check):
        setup = runs.set_up(config)
        if observer is not None and config.event:
            watchers, _ = watchers_of(config, observer.probes, describe_layers(config.model))
            check_told(config, watchers, told(setup.blueprint, observer))
        folder = Path(config.folder)
        with together.together("run folder"):
            if together.first():
                contents.mark(folder)
                if not going_on:
                    codec.save(config, folder / contents.CONFIG)
                elif (saved := codec.load(ExperimentConfig, folder / contents.CONFIG)).steps != config.steps:
                    log.info("%s goes on to step %d, where it was to end at %d", folder, config.steps, saved.steps)
                    codec.save(dataclasses.replace(saved, steps=config.steps), folder / contents.CONFIG)
        with Termination() as termination:
            return _Loop(setup, observer, termination, check, judge).run()


class _Loop:
    """A run in progress. Metrics of step n are read after step n + 1 is dispatched, so that reading never stalls the device."""

    def __init__(
        self, setup: runs.Setup, observer: Probes | None, termination: Termination, check: Callable[[], None], judge: Judge | None
    ):
        self.setup, self.observer, self.termination, self.check, self.judge = setup, observer, termination, check, judge
        config = self.config = setup.config
        self.folder = Path(config.folder)
        self.journal, self.clock, self.spread = Journal(config, check), Clock(), Spread()
        self.checkpoints = Checkpoints(
            self.folder / contents.CHECKPOINTS, keep_last=config.keep_last, keep_best=config.keep_best, check=check
        )
        self.validation = Validation(setup.blueprint, setup.mesh, setup.data)
        self.meter = Meter(tuple(setup.data.parts))
        self.iterator = setup.data.train()
        self.probes = () if self.observer is None else self.observer.probes
        self.layers = describe_layers(config.model)
        self.watchers, self.spikes = watchers_of(config, self.probes, self.layers)
        self.actions = Actions(config)
        peak = peak_flops(jax.devices()[0])
        self.step_flops = None if peak is None else 3 * config.model.flops(config.data.seq_len) / (peak * setup.mesh.size)
        self.programs: dict[bool, Any] = {}
        """The compiled step, without and with probes."""
        self.tokens = 0
        """Predicted so far."""
        self.dispatched = 0
        """The last step that was sent to the devices."""
        self.judged: str | None = None
        """Why the judge has ended it."""

    def run(self) -> Result:
        state, first, seconds = self._start()
        self.clock = Clock(seconds)
        try:
            with _peers_lost():
                if first < self.config.steps:
                    with heartbeat.phase("compile"):
                        self._compile()
                    self.journal.facts(self.setup, self.layers)
                self.termination.compiling = False
                state, last = self._until_the_end(state, first)
                with heartbeat.phase("end"):
                    if last == self.config.steps:
                        self._picture(state, last)
                    self.checkpoints.wait()
        finally:
            self.iterator.close()
            self.checkpoints.close()
        finished = last == self.config.steps
        return Result(self.folder, last, finished, self.journal.latest, not finished and last in self.actions.stops, self.judged)

    def _start(self, at: int | None = None) -> tuple[TrainState, int, float]:
        """The state to go on from (the newest, or that of step `at`), its step, and the seconds spent before."""
        restored = self.checkpoints.restore(self.setup.like, at)
        step = 0 if restored is None else restored[0]
        with together.together("run folder"):
            if together.first():
                self.check()
                self._cut_back(None if restored is None else step, resuming=at is None)
        if restored is None:
            return self._fresh(), 0, 0.0
        _, state, extra = restored
        try:
            self._place_data(extra["data"], step)
            load_states(self._memories, extra)
            self.tokens, seconds = int(extra["tokens"]), float(extra["seconds"])
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.checkpoints.folder}/{step} does not hold what a run goes on from ({type(error).__name__}: {error}); "
                "move it away to go on from the one before"
            ) from error
        log.info("%s goes on from step %d", self.folder, step)
        return state, step, seconds

    def _place_data(self, state: dict[str, object], step: int) -> None:
        """Goes on with the batches after those of a checkpoint, or with the first ones of the other data that a branch was given there."""
        other = together.decide("branch", lambda: begins_other_data(self.folder, step))
        if other and (changed := self.iterator.other(state)):
            log.info("%s begins with the first batch of other data: %s", self.folder, changed)
            return
        self.iterator.set_state(state)

    def _fresh(self) -> TrainState:
        """The state at step 0: with new weights, or those of another run."""
        return self.setup.fresh() if self.config.init_from is None else origins.begin(self.setup, self.config.init_from)

    def _cut_back(self, step: int | None, *, resuming: bool) -> None:
        """Leaves of the run's numbers those up to a checkpoint's step, and says what `resuming` finds missing of them."""
        if step is None:
            set_aside(self.folder)
            return
        trim_metrics(self.folder, step)
        if resuming:
            before = codec.load(ExperimentConfig, self.folder / contents.CONFIG).log_every
            log_every = max(before, self.config.log_every)
            if lost := gaps(self.folder, step, log_every=log_every, probe_every=self.config.probe_every):
                log.warning("%s: %s", self.folder, "; ".join(lost))

    def _compile(self) -> None:
        """Both steps, ahead of time: compiling is then no part of any step's time, and its errors come before training."""
        for notice in whole_rows(self.config):
            log.info("%s", notice)
        log.info("compiling a step of %s", self.setup.blueprint.describe())
        self.programs[False] = self.setup.lower(controls=self._controls(0, 0)).compile()
        if self.observer is not None and not self.termination.asked:
            self.programs[True] = self.setup.lower(self.observer, controls=self._controls(0, 0)).compile()

    def _until_the_end(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        """Steps from `step` on, with what has to be done again after rewinds."""
        events: list[Event] = []
        while True:
            with self.journal.open(step):
                self.journal.events(events)
                try:
                    return self._steps(state, step)
                except Rewind as rewind:
                    cause, position = rewind, rewind.step + self.iterator.step - self.dispatched
            state, step, event = self._rewind(cause, position)
            events = [event]

    def _rewind(self, cause: Rewind, position: int) -> tuple[TrainState, int, Event]:
        """The state of the last checkpoint and its step, the batches going on at `position`; and what to say of it."""
        rewinds, rates = self.actions.rewinds + 1, self.actions.rates
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
        self.actions.rewinds, self.actions.rates = rewinds, rates  # which are not undone
        text = f"{cause}: back to step {step:,}, leaving out the {skipped:,} batches since (rewind {rewinds})"
        event = Event(step + 1, SpikeWatch.rewound, None, None, float(cause.step), float(rewinds), text)
        return state, step, self.actions.take(event.step, [event])[0]

    def _steps(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        config, pending, stopping = self.config, None, False
        self.dispatched = step
        self.clock.lap()
        while step < config.steps and not self.termination.asked and not stopping:
            probing = config.probe_every is not None and (step == 0 or _due(step + 1, config.probe_every))
            controls = self._controls(step + 1, self.iterator.step)
            with self.clock.waiting("data"):
                batch = next(self.iterator)
            state, metrics = self.programs[probing](state, self.setup.layout.place(batch), **self.setup.controls, **controls)
            step += 1
            self.dispatched = step
            self._read(pending)
            pending = (step, metrics)
            self.termination.look(step)
            stopping = step in self.actions.stops
            last = step == config.steps or self.termination.asked or stopping
            saving = last or _due(step, config.checkpoint_every) or step in self.actions.saves
            evaluating = step == config.steps or _due(step, config.eval_every)
            judging = self.judge is not None and step in self.judge.steps
            if evaluating or saving or judging:
                self._read(pending)
                pending = None
                with self.clock.paused():
                    loss = self._evaluate(state, step) if evaluating else None
                    if self.judge is not None and judging and (why := self.judge(step, self.journal.latest)) is not None:
                        self.judged, stopping, saving = why, True, True
                    if saving:
                        self._save(state, step, loss)
        self._read(pending)
        if self.termination.asked:  # it may have come after the step looked, as while validating
            self._save(state, step, None)
        return state, step

    @property
    def _memories(self) -> list[Memory]:
        """What checkpoints keep beside the arrays."""
        return [*self.watchers, self.actions, *([self.meter] if self.setup.data.parts else [])]

    def _controls(self, step: int, position: int) -> dict[str, np.ndarray]:
        """What a step takes beside its state and the batch of number `position`, where there is such."""
        controls = {} if self.config.spike.sigma is None else {"bounds": self.spikes.bounds(step)}
        if self.actions.lowers:
            controls["rate"] = self.actions.rate(step)
        if (sources := self.setup.data.sources(position)) is not None:
            controls["sources"] = sources
        return controls

    def _read(self, pending: tuple[int, dict[str, Any]] | None) -> None:
        """Takes in the metrics of a step, once the device has them."""
        if pending is None:
            return
        step, metrics = pending
        statistics = metrics.pop("statistics", None)
        with self.clock.waiting("devices"):
            if (sums := told_by_source(metrics)) is not None:
                self.meter.count(sums)
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        heartbeat.step(step)
        self._count(step, tokens=int(values.pop("tokens")), bad=int(values.pop("bad_steps")))
        arrays = {} if statistics is None else probe_arrays(statistics)
        found = [event for watcher in self.watchers for event in watcher.update(step, {**values, **arrays})]
        self.journal.events(self.actions.take(step, found))
        if statistics is not None:
            self.journal.probes(step, arrays)
            kinds, sources = [layer["kind"] for layer in self.layers], tuple(self.setup.data.parts)
            values |= probe_metrics(arrays, self.probes, kinds, sources)
        if logging_now := _due(step, self.config.log_every) or step == self.config.steps:
            values |= {**self._speed(step), **self.meter.lap()}
        if logging_now or statistics is not None:
            self.journal.metrics(step, values, tokens=self.tokens, seconds=self.clock.seconds)
            self.journal.stand(step)

    def _count(self, step: int, *, tokens: int, bad: int) -> None:
        """Raises TrainingFailed after too many steps in a row whose update was left out."""
        self.tokens += tokens
        self.clock.count(tokens)
        if bad >= self.config.optimizer.max_bad_steps:
            raise TrainingFailed(
                f"the last {bad} steps up to {step} had a loss or gradient that is not finite or a spike, optimizer.max_bad_steps="
                f"{self.config.optimizer.max_bad_steps}; parameters are those before them. Lower optimizer.learning_rate in a new run"
            )

    def _speed(self, step: int) -> dict[str, float]:
        """Metrics of the steps since they were last asked for."""
        lap = self.clock.lap()
        values = {"time/step": lap.step, "throughput/tokens_per_second": lap.tokens_per_second, "time/data": lap.data}
        values |= self.spread.report(step, lap)
        if self.step_flops is not None:
            values["throughput/mfu"] = lap.tokens_per_second * self.step_flops
        if self.actions.may_rewind:
            values["optimizer/rewinds"] = float(self.actions.rewinds)
        return values

    def _evaluate(self, state: TrainState, step: int) -> float | None:
        """Validation loss after `step`, None where nothing is held out."""
        data = self.setup.data
        if not len(data.val):
            return None
        with heartbeat.phase("evaluate"):
            found = self.validation(_averaged(state), state.buffers, self.config.eval_batches)
        self.journal.metrics(step, found.metrics(), tokens=self.tokens, seconds=self.clock.seconds)
        asked, every = self.config.eval_batches, len(data.val)
        sample = "" if asked is None or asked >= every else f" ({asked} of {every:,} batches)"
        self.journal.say(f"step {step:,}: validation {found.describe()}{sample}")
        return found.loss

    def _save(self, state: TrainState, step: int, loss: float | None) -> None:
        if step in self.checkpoints.steps():
            return
        extra = {
            "data": self.iterator.get_state(),
            "watchers": states(self._memories),
            "tokens": self.tokens,
            "seconds": self.clock.seconds,
        }
        with heartbeat.phase("save"):
            self.checkpoints.kept.steps = self.actions.kept(step)
            self.checkpoints.save(step, state, extra, loss=loss)

    def _picture(self, state: TrainState, last: int) -> None:
        if together.decide("end", (self.folder / ATTENTION).exists):
            return
        self.check()
        setup, data = self.setup, self.setup.data
        params, buffers = _averaged(state), state.buffers
        write_pictures(self.folder, last, setup.blueprint, setup.mesh, params, buffers, data.whole(), data.strings)


def _averaged(state: TrainState) -> Arrays:
    """The parameters to read: averaged ones where the run keeps an average."""
    return state.params if state.ema is None else state.ema


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


@contextlib.contextmanager
def _peers_lost() -> Iterator[None]:
    """What a collective raises when a host is gone is no bad input."""
    try:
        yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        if together.count() == 1:
            raise
        raise TrainingFailed(f"host {together.index()} of {together.count()} cannot go on: {str(error)[:1000]}") from error
