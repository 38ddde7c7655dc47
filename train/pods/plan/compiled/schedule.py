"""How a step's time is made up, as a compiled program is scheduled."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

Key = tuple[str, tuple[str, ...]]
"""Kind and mesh axes of a collective."""

Part = tuple[str, str]
"""A kind of layer (`hlo.layer_of`) and a `durations.Source`."""


@dataclasses.dataclass
class Schedule:
    """One run of a program or of a part of it."""

    seconds: float = 0.0
    waits: dict[Key, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    """Of these seconds, those in which a device has nothing to do but wait, by kind and mesh axes of the collective under way."""
    work: dict[Part, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    """The others, by kind of layer and what says how long they are."""

    def add(self, other: Schedule, times: int = 1) -> None:
        """Goes on with another part, so many times."""
        self.seconds += times * other.seconds
        for key, wait in other.waits.items():
            self.waits[key] += times * wait
        for part, seconds in other.work.items():
            self.work[part] += times * seconds

    def by_source(self) -> dict[str, float]:
        """Seconds of work by what says how long it is, for all kinds of layers."""
        return _sums((source, seconds) for (_, source), seconds in self.work.items())

    def by_layer(self) -> dict[str, float]:
        """Seconds of work by kind of layer, the most first."""
        found = _sums((layer, seconds) for (layer, _), seconds in self.work.items())
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def _sums(parts: Iterable[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = collections.defaultdict(float)
    for name, seconds in parts:
        found[name] += seconds
    return dict(found)
