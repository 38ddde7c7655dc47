"""How evenly tokens choose experts."""

from __future__ import annotations

import dataclasses

import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.means import concentration
from plait.train.probes.statistic import Metric, Panel, Statistic, Threshold

COLLAPSE = 0.8
"""Concentration above which a load counts as collapsed; chosen here."""


def load_collapse(of: str) -> Threshold:
    """The event of a layer whose tokens use nearly the same of its experts or heads."""
    return Threshold(
        kind="load_collapse",
        limits=(COLLAPSE,),
        per="layer",
        meaning=f"the concentration of a layer's load on one of its {of} rises above the limit",
        message=f"nearly all tokens of {{where}} use the same of its {of}: {{value:.2f}} of the way from even use",
    )


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
        Statistic(
            name="expert_concentration",
            per="layer",
            unit="0 even, 1 all",
            meaning="how far the share of tokens that use the busiest routed expert is on its way from the even share to 1",
            metric=Metric(name="moe/concentration", reduce=np.nanmax, meaning="of the layer with the largest"),
            panel=Panel(title="Concentration", section="Mixture of experts", lines=True, most=True, limits=(0, 1)),
            event=load_collapse("experts"),
        ),
    )

    def measure(self, look, config):
        load = look.channels.get("expert_load")
        if load is None:
            return {}
        return {
            "expert_load_most": load.max(),
            "expert_load_least": load.min(),
            "expert_concentration": concentration(look.channels["expert_share"]),
        }
