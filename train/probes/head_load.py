"""How evenly tokens choose heads."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from plait.train.probes.base import Probe, Statistic, register


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
            metric=("moh/max_load", _max_routed),
        ),
    )

    def measure(self, look, config):
        return {"head_load": look.observed.get("load")}
