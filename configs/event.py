"""What is done about events."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from plait.configs.components import Config
from plait.configs.domains import Number, Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class EventConfig(Config):
    """When events of one kind occur, and what is done then. Metrics are read a step late, so an action is, too."""

    path = "event.KIND"

    limit: Positive | None = None
    """Replaces the limits of the kind; None keeps those that its probe declares."""
    action: Literal["warn", "checkpoint", "stop", "lower_rate", "rewind"] = "warn"
    """Besides saying so: `checkpoint` saves and never deletes that one; `stop` saves and ends the run; `lower_rate` lowers the learning rate
    for good; `rewind` goes back to the last checkpoint and leaves out the batches since."""
    factor: Annotated[float, Number(above=0, least=1e-6, below=1)] = 0.5
    """What `lower_rate` multiplies the learning rate by, once for each step with such an event."""

    def check(self) -> None:
        if self.factor != type(self).factor and self.action != "lower_rate":
            raise ValueError(f"factor={self.factor} is of action=lower_rate, not {self.action}; leave one of them out")


def with_named(table: Mapping[str, EventConfig], words: Sequence[str]) -> dict[str, EventConfig]:
    """`table` with an entry for each kind that the words of a command line name, as `--event.KIND.action` does."""
    named = [found[1].replace("-", "_") for word in words if (found := re.match(r"--event\.([^.=]+)\.", word))]
    return {**{kind: EventConfig() for kind in named}, **table}
