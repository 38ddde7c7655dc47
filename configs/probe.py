"""Which probes run, and what of a batch they look at."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from plait.configs.components import Config
from plait.configs.domains import Line, Rows, Span, Whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig(Config):
    """Which probes run, and which part of a batch they look at: enough for stable statistics, little enough to cost nothing."""

    path = "probe"

    only: Line | None = None
    """Names of the probes that run, separated by commas: `all` that there are, or `default,NAME` to add one; None is `default`."""
    rows: Span = 32
    """Query positions per sequence whose attention is looked at, evenly spaced (all of them when the sequence is shorter)."""
    sequences: Rows = 4
    """Sequences of the batch looked at."""
    first_k: Annotated[int, Whole(1, 64)] = 4
    """Number of leading document positions whose received attention alpha_1..alpha_K is reported."""
