"""What is done about events, as `--event.KIND.action` says. Decided from numbers that all hosts have alike, so all act at the same step."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from plait.configs.components import ConfigError
from plait.configs.experiment import ExperimentConfig
from plait.configs.spike import SpikeConfig
from plait.train.probes.base import Probe, chosen
from plait.train.watching.spikes import LAG, LossSpikes, SpikeWatch
from plait.train.watching.watchers import Event, Memory, Watcher

STOPS = "; the run stops after step {:,}"
"""How the message of an event ends that stops a run."""


class Rewind(Exception):
    """Something happened in step `step` and the run shall go back."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


class Actions(Memory):
    """What events have asked for.

    The metrics of step n are read after step n + 1 is dispatched, at times before. Whatever is asked for in step n is therefore done as if
    they were always read late, so that a resumed run does the same: saving and stopping after step n + 1, a lower rate from step n + 2 on.
    """

    name = "actions"
    fields = ("saves", "stops", "rates", "rewinds")

    def __init__(self, config: ExperimentConfig):
        self.config = config
        self.saves: list[int] = []
        """Steps after which a checkpoint is saved and kept."""
        self.stops: list[int] = []
        """Steps after which the run stops."""
        self.rates: list[list[float]] = []
        """Steps from which the rate is lower, and by what factor."""
        self.rewinds = 0

    def take(self, step: int, events: Sequence[Event]) -> list[Event]:
        """The events of a step, the first of each kind saying what is done. Raises Rewind where the run shall go back."""
        if step >= self.config.steps:
            return list(events)
        firsts = {event.kind: event for event in reversed(events)}
        back = [event for kind, event in firsts.items() if self._rewinds(kind)]
        every = self.config.checkpoint_every
        if back and every is not None and step > every:
            raise Rewind(step, back[0].message)
        return [
            dataclasses.replace(event, message=event.message + self._do(event)) if event is firsts[event.kind] else event
            for event in events
        ]

    @property
    def lowers(self) -> bool:
        """Whether the rate is, or may yet be, another than the schedule's."""
        return bool(self.rates) or any(one.action == "lower_rate" for one in self.config.event.values())

    @property
    def may_rewind(self) -> bool:
        """Whether rewinds are counted."""
        return any(map(self._rewinds, [SpikeWatch.skipped, *self.config.event]))

    def kept(self, step: int) -> list[int]:
        """The steps whose checkpoints stay at a step: those that events asked for, and the last one to which the run may go back."""
        every = self.config.checkpoint_every
        return [*self.saves, step - step % every] if self.may_rewind and every is not None else self.saves

    def rate(self, step: int) -> np.ndarray:
        """What the learning rate of a step is multiplied by."""
        return np.asarray(math.prod(factor for first, factor in self.rates if first <= step), np.float32)

    def _rewinds(self, kind: str) -> bool:
        if kind == SpikeWatch.skipped:
            return self.config.spike.sigma is not None and self.config.spike.action == "rewind"
        return kind in self.config.event and self.config.event[kind].action == "rewind"

    def _do(self, event: Event) -> str:
        """Notes what is to be done about an event, in words."""
        one = self.config.event.get(event.kind)
        if one is None:
            return ""
        after = event.step + 1
        if one.action == "checkpoint":
            self.saves = [*self.saves, after]
            return f"; step {after:,} is saved and kept"
        if one.action == "stop":
            self.stops = [*self.stops, after]
            return STOPS.format(after)
        if one.action == "lower_rate":
            first = event.step + (0 if event.kind == SpikeWatch.rewound else LAG)
            self.rates = [*self.rates, [first, one.factor]]
            return f"; from step {first:,} on the learning rate is {one.factor:g} times what it was"
        return ""


def watchers_of(
    config: ExperimentConfig, probes: Sequence[Probe], layers: Sequence[Mapping[str, Any]] = ()
) -> tuple[list[Watcher], SpikeWatch]:
    """What finds the events of a run with these probes, with the limits that `config.event` sets; among them the watch of spikes.

    Raises:
        ConfigError: a kind of event there that the run cannot have, or a limit or action that the kind cannot have; to go back for spikes
            without a rule of what they are.
    """
    if config.spike.action != SpikeConfig.action and config.spike.sigma is None:
        raise ConfigError(
            f"spike.action={config.spike.action} needs a rule of what a spike is, and spike.sigma is None; set --spike.sigma"
        )
    spikes = SpikeWatch(config.spike)
    watchers = [LossSpikes(), *(watcher for probe in probes for watcher in probe.watchers(layers)), spikes]
    for kind, one in config.event.items():
        mine = [watcher for watcher in watchers if kind in watcher.kinds]
        if not mine:
            raise ConfigError(f"event.{kind} {_missing(config, kind, [name for watcher in watchers for name in watcher.kinds])}")
        if mine == [spikes]:
            _check_of_spikes(config, kind)
        if one.limit is None:
            continue
        limited = [watcher for watcher in watchers if kind in watcher.limits]
        if not limited:
            has = ", ".join(dict.fromkeys(name for watcher in watchers for name in watcher.limits))
            raise ConfigError(
                f"event.{kind}.limit={one.limit:g} replaces none, as this kind has no limit; leave it out, or use {has}"
            )
        for watcher in limited:
            least, most = watcher.bounded.get(kind, (0.0, math.inf))
            if not least < one.limit < most:
                usual = ", ".join(f"{limit:g}" for limit in watcher.limits[kind])
                raise ConfigError(
                    f"event.{kind}.limit={one.limit:g} must be between {least:g} and {most:g}, where what it is of lies; use {usual}"
                )
            watcher.limits = {**watcher.limits, kind: (one.limit,)}
    return watchers, spikes


def check_told(config: ExperimentConfig, watchers: Sequence[Watcher], told: Sequence[Collection[str]]) -> None:
    """Raises ConfigError where no layer of the model tells what `config.event` is of; `told` are the names of each one's statistics."""
    for kind in config.event:
        if not any(watcher.sees(told) for watcher in watchers if kind in watcher.kinds):
            raise ConfigError(
                f"event.{kind} would never happen: no layer of model.pattern={config.model.pattern!r} tells what it is of; leave it out, "
                "or use a mixer that does"
            )


def _check_of_spikes(config: ExperimentConfig, kind: str) -> None:
    """Raises ConfigError where a run has no skipped steps or rewinds to do something about, or where it is to go back for them."""
    back = config.event[kind].action == "rewind"
    if kind != SpikeWatch.skipped:
        if back:
            raise ConfigError(f"event.{kind}.action=rewind would go back for having gone back; use lower_rate, or leave it out")
        if not Actions(config).may_rewind:
            raise ConfigError(
                f"event.{kind} is of runs that go back, and this one does not; set --spike.action rewind or --event.KIND.action rewind"
            )
        return
    if config.spike.sigma is None:
        raise ConfigError(f"event.{kind} needs a rule of what a spike is, and spike.sigma is None; set --spike.sigma")
    if back:
        raise ConfigError(f"event.{kind}.action=rewind is what spike.action=rewind says; use --spike.action rewind")


def _missing(config: ExperimentConfig, kind: str, there: Sequence[str]) -> str:
    """Why no watcher of the run finds a kind, and what to do about it."""
    every = {name: probe.name for probe in chosen() for watcher in probe.watchers(()) for name in watcher.kinds}
    if kind not in every:
        near = difflib.get_close_matches(kind, [*there, *every], n=1)
        return "is no kind of event; " + (
            f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(dict.fromkeys([*there, *every]))}"
        )
    if config.probe_every is None:
        return f"is found by the probe {every[kind]!r}, and probe_every=None runs none; set probe_every"
    only = config.probe.only or "default"
    return f"is found by the probe {every[kind]!r}, which probe.only={only!r} leaves out; use --probe.only {only},{every[kind]}"
