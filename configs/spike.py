"""What is done about spikes of the loss."""

from __future__ import annotations

import dataclasses
from typing import Literal

from plait.configs.components import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikeConfig(Config):
    """What counts as a spike of the loss or gradient norm, and what is done about it. The update of such a step is never applied."""

    path = "spike"

    sigma: float | None = None
    """Robust standard deviations above the median of recent steps from which a step is a spike; None never looks."""
    window: int = 128
    """Recent steps the median is over; a quarter of them must be there before the first spike."""
    action: Literal["skip", "rewind"] = "skip"
    """`skip` leaves the step out; `rewind` also goes back to the last checkpoint and leaves out the batches since."""
    max_rewinds: int = 5
    """Rewinds after which a further one ends the run."""

    def check(self) -> None:
        checks = [
            (self.sigma is None or self.sigma > 0, "sigma", "must be positive; use None to never look"),
            (self.window >= 4, "window", "must be at least 4"),
            (self.max_rewinds >= 1, "max_rewinds", "must be at least 1; use spike.action=skip for none"),
        ]
        for good, name, rule in checks:
            if not good:
                raise ValueError(f"{name}={getattr(self, name)} {rule}")
