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
    far: Span = 64
    """Tokens back from which attention counts as far: that of long-context heads, of the probe `distance`."""
    waad_window: Span = 10
    """Distance at which WAAD cuts off, of the probe `waad_fai`. Not confirmed by the paper, as the next two; recorded with the run."""
    fai_from: Span = 10
    """Nearest of the later queries whose attention is a token's future attention (FAI),"""
    fai_to: Span = 50
    """and the farthest."""

    def check(self) -> None:
        if self.fai_from > self.fai_to:
            raise ValueError(
                f"fai_from={self.fai_from} must be at most fai_to={self.fai_to}, the farthest query that counts; "
                f"use fai_from={self.fai_to} or less"
            )
