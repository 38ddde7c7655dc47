"""How far the students of an attention transfer are from their teachers."""

from __future__ import annotations

import dataclasses

import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.statistic import Metric, Panel, Statistic


@register("transfer_error", source="LoLCATs (2410.10254)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferError(Probe):
    """What a student gives beside what its teacher does."""

    statistics = (
        Statistic(
            name="transfer_error",
            per="layer",
            unit="share of the teacher's",
            meaning="squared difference of student and teacher over the square of what the teacher gives; 0 is the same, 1 as good as nothing",
            metric=Metric(name="transfer/error", reduce=np.nanmean, meaning="the mean over the layers"),
            panel=Panel(title="Error of the students", section="Attention transfer", lines=True),
        ),
    )

    def measure(self, look, config):
        error = look.observed.get("transfer_error")
        return {} if error is None else {"transfer_error": error}
