"""How evenly tokens choose heads."""

from __future__ import annotations

import dataclasses

import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.expert_load import load_collapse
from plait.train.probes.means import concentration
from plait.train.probes.statistic import Metric, Panel, Statistic
from plait.train.probes.words import count

_IDLE = 0.02  # share of tokens


@register("head_load", source="MoH (2410.11842)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadLoad(Probe):
    """The share of tokens that use each head of a mixture."""

    statistics = (
        Statistic(
            name="head_load",
            per="head",
            unit="share of tokens",
            meaning="share of tokens that use the head (MoH); 1 for shared heads",
            panel=Panel(title="Head load", section="Mixture of heads", map=True, limits=(0, 1)),
        ),
        Statistic(
            name="head_load_most",
            per="layer",
            unit="share of tokens",
            meaning="share of tokens that use the busiest routed head",
            metric=Metric(name="moh/max_load", reduce=np.nanmax, meaning="the busiest routed head"),
        ),
        Statistic(
            name="head_concentration",
            per="layer",
            unit="0 even, 1 all",
            meaning="how far that share is on its way from the even share to 1",
            metric=Metric(name="moh/concentration", reduce=np.nanmax, meaning="of the layer with the largest"),
            panel=Panel(title="Concentration", section="Mixture of heads", lines=True, most=True, limits=(0, 1)),
            event=load_collapse("heads"),
        ),
    )

    def measure(self, look, config):
        found = {"head_load": look.observed.get("load")}
        if (routed := look.observed.get("routed_load")) is not None:
            found |= {"head_load_most": routed.max(), "head_concentration": concentration(routed)}
        return found

    def summary(self, run):
        load = run.by_head("head_load")
        if load is None or not np.isfinite(load[-1]).any():
            return None
        last = load[-1]
        idle = int((last < _IDLE).sum())
        text = f"Heads are chosen by {np.nanmin(last):.0%} to {np.nanmax(last):.0%} of the tokens"
        return text + (f"; {count(idle, 'head')} by fewer than {_IDLE:.0%}." if idle else "; none is idle.")
