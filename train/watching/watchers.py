"""Watchers: they take in the numbers of every step and say what happened."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

Values = Mapping[str, Any]
"""The metrics of a step by name, floats; on probe steps the statistics too, as float arrays over layers."""


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that happened; `layer` or `head` is None where it concerns the whole model or layer."""

    step: int
    kind: str
    layer: int | None
    head: int | None
    value: float
    threshold: float
    message: str

    def to_dict(self) -> dict[str, Any]:
        """The line of `events.jsonl`."""
        return dataclasses.asdict(self)


class Memory:
    """What checkpoints keep beside the arrays, so that a resumed run does the same."""

    name: str
    """Under which a checkpoint keeps its state."""
    fields: ClassVar[tuple[str, ...]]
    """Its attributes that later steps depend on, numbers, lists and None."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on, as JSON."""
        return {field: getattr(self, field) for field in self.fields}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken: no event is repeated and none is lost."""
        for field in self.fields:
            setattr(self, field, state[field])


class Watcher(Memory, abc.ABC):
    """Fed in step order; what it finds depends on what it was fed alone, so that a resumed run finds the same."""

    kinds: Mapping[str, str]
    """Each kind of its events, and when it happens: the docs' line."""
    limits: Mapping[str, tuple[float, ...]] = {}
    """Those of kinds that have some, its own and others that it looks for; `--event.KIND.limit` replaces them."""
    bounded: Mapping[str, tuple[float, float]] = {}
    """Between which two numbers a limit of a kind must lie, where what it is of does."""

    def sees(self, told: Sequence[Collection[str]]) -> bool:
        """Whether it may find something where layers tell the statistics of these names."""
        return True

    @abc.abstractmethod
    def update(self, step: int, values: Values) -> list[Event]:
        """The events of a step."""


def states(memories: Iterable[Memory]) -> dict[str, Any]:
    """The states of watchers and what else remembers, by name."""
    return {one.name: one.state_dict() for one in memories}


def load_states(memories: Iterable[Memory], extra: Mapping[str, Any]) -> None:
    """They go on from what a checkpoint holds beside its arrays; one that was not there then begins."""
    found = extra["watchers"] if "watchers" in extra else _of_one_detector(extra)
    if "actions" not in found and "rewinds" in found.get("spikes", {}):  # from before there were actions but this one
        found = {**found, "actions": {"saves": [], "stops": [], "rates": [], "rewinds": found["spikes"]["rewinds"]}}
    for one in memories:
        if one.name in found:
            one.load_state_dict(found[one.name])


def _of_one_detector(extra: Mapping[str, Any]) -> dict[str, Any]:
    """States by watcher from a checkpoint from before each had its own: one detector kept those of all events."""
    old = extra["events"]
    losses = {"recent": old["losses"], "spiking": old["spiking"], "last": old["last_spike"]}
    names = {"sink": "sink", "entropy": "entropy_ratio", "logit": "max_logit", "activation": "massive_activation"}
    found: dict[str, Any] = {name: {"seen": old["first_probe"] is not None, "fired": [], "held": []} for name in names.values()}
    found["sink_rate"] = {**found["sink"], "fired": [], "held": []}
    for what in ("fired", "held"):
        for key in old[what]:
            prefix, _, place = key.partition("/")
            name = "sink_rate" if key == "sink/model" else names[prefix]
            found[name][what].append(place)
    found["entropy_collapse"] = {"losses": losses, "fired": "entropy/model" in old["fired"]}
    found["loss_spike"] = losses
    if "spikes" in extra:
        found["spikes"] = extra["spikes"]
    return found
