"""Which probes run, and what of a batch they look at."""

from __future__ import annotations

import dataclasses

from plait.configs.components import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig(Config):
    """Which probes run, and which part of a batch they look at: enough for stable statistics, little enough to cost nothing."""

    path = "probe"

    only: str | None = None
    """Names of the probes that run, separated by commas; None for all that there are."""
    rows: int = 32
    """Query positions per sequence whose attention is looked at, evenly spaced (all of them when the sequence is shorter)."""
    sequences: int = 4
    """Sequences of the batch looked at."""
    first_k: int = 4
    """Number of leading document positions whose received attention alpha_1..alpha_K is reported."""

    def check(self) -> None:
        for name in ("rows", "sequences", "first_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; turn probes off with probe_every=None")
