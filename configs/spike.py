"""What is done about spikes of the loss."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from plait.configs.components import Config
from plait.configs.domains import Positive, Steps, Whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikeConfig(Config):
    """What counts as a spike of the loss or gradient norm, and what is done about it. The update of such a step is never applied."""

    path = "spike"

    sigma: Positive | None = None
    """Robust standard deviations above the median of recent steps from which a step is a spike; None never looks."""
    window: Annotated[int, Whole(4, 2**20)] = 128
    """Recent steps the median is over; a quarter of them must be there before the first spike."""
    action: Literal["skip", "rewind"] = "skip"
    """`skip` leaves the step out; `rewind` also goes back to the last checkpoint and leaves out the batches since."""
    max_rewinds: Steps = 5
    """Rewinds after which a further one ends the run."""
