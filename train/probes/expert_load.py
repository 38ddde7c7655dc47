"""How evenly tokens choose experts."""

from __future__ import annotations

import dataclasses

import numpy as np

from plait.train.probes.base import Probe, Statistic, register


@register("expert_load", source="Switch Transformers (2101.03961)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertLoad(Probe):
    """The load of each expert of a mixture."""

    statistics = (
        Statistic(
            name="expert_load",
            per="layer",
            unit="times the even share",
            meaning="load of each routed expert over the mean of the layer's experts, padding left out; 1 is balanced",
            metric=("moe/max_load", np.nanmax),
        ),
    )

    def measure(self, look, config):
        return {"expert_load": look.channels.get("expert_load")}
