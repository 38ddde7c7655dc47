"""How a step's time is made up, as a compiled program is scheduled."""

from __future__ import annotations

import collections
import dataclasses

Key = tuple[str, tuple[str, ...]]
"""Kind and mesh axes of a collective."""


@dataclasses.dataclass
class Schedule:
    """One run of a program or of a part of it."""

    seconds: float = 0.0
    waits: dict[Key, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    """Of these seconds, those in which a device has nothing to do but wait, by kind and mesh axes of the collective under way."""
    work: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    """The others, by what says how long they are: see `durations.Source`."""

    def add(self, other: Schedule, times: int = 1) -> None:
        """Goes on with another part, so many times."""
        self.seconds += times * other.seconds
        for key, wait in other.waits.items():
            self.waits[key] += times * wait
        for source, seconds in other.work.items():
            self.work[source] += times * seconds
