"""How evenly tokens choose experts."""

from __future__ import annotations

import dataclasses

import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.statistic import Metric, Panel, Statistic


@register("expert_load", source="Switch Transformers (2101.03961)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertLoad(Probe):
    """The load of each expert of a mixture."""

    statistics = (
        Statistic(
            name="expert_load_most",
            per="layer",
            unit="times the even share",
            meaning="load of the routed expert with most tokens over the mean of the layer's; 1 is balanced",
            metric=Metric(name="moe/max_load", reduce=np.nanmax, meaning="the busiest expert"),
            panel=Panel(title="Load of the busiest expert", section="Mixture of experts", lines=True, most=True),
        ),
        Statistic(
            name="expert_load_least",
            per="layer",
            unit="times the even share",
            meaning="load of the routed expert with fewest tokens over the mean of the layer's; 0 is an expert that nobody chose",
            panel=Panel(title="Load of the idlest expert", section="Mixture of experts", lines=True),
        ),
    )

    def measure(self, look, config):
        load = look.channels.get("expert_load")
        return {} if load is None else {"expert_load_most": load.max(), "expert_load_least": load.min()}
