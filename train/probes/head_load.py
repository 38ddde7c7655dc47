"""How evenly tokens choose heads."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.statistic import Metric, Panel, Statistic
from plait.train.probes.words import count

_IDLE = 0.02  # share of tokens


def _max_routed(load: np.ndarray) -> Any:
    routed = np.where(load < 1.0, load, np.nan)
    return np.nanmax(routed) if np.isfinite(routed).any() else 1.0


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
            metric=Metric(name="moh/max_load", reduce=_max_routed, meaning="the busiest routed head"),
            panel=Panel(title="Head load", section="Mixture of heads", map=True, limits=(0, 1)),
        ),
    )

    def measure(self, look, config):
        return {"head_load": look.observed.get("load")}

    def summary(self, run):
        load = run.by_head("head_load")
        if load is None or not np.isfinite(load[-1]).any():
            return None
        last = load[-1]
        idle = int((last < _IDLE).sum())
        text = f"Heads are chosen by {np.nanmin(last):.0%} to {np.nanmax(last):.0%} of the tokens"
        return text + (f"; {count(idle, 'head')} by fewer than {_IDLE:.0%}." if idle else "; none is idle.")
