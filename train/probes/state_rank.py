"""In how many directions states hold something."""

from __future__ import annotations

import dataclasses

import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.means import masked_mean
from plait.train.probes.memory import SECTION
from plait.train.probes.ranks import effective_rank
from plait.train.probes.statistic import Metric, Panel, Statistic


@register("state_rank", source="The effective rank (Roy and Vetterli, EUSIPCO 2007), of states")
@dataclasses.dataclass(frozen=True, kw_only=True)
class StateRank(Probe):
    """Effective rank of the states of linear heads; those that are a row of numbers have none."""

    by_default = False
    statistics = (
        Statistic(
            name="state_rank",
            per="head",
            unit="directions",
            meaning="effective rank of the state at the end of the sequence: exp of the entropy of its singular values, at most its smaller "
            "side",
            metric=Metric(name="attn/state_rank", reduce=np.nanmedian, meaning="median over heads and layers"),
            panel=Panel(title="State rank", section=SECTION, lines=True, map=True),
        ),
    )

    def measure(self, look, config):
        memory = look.observed.get("memory")
        if memory is None or min(memory.shape[-2:]) == 1:
            return {}
        real = (look.at.segment_ids > 0).any(1)[:, None]
        return {"state_rank": masked_mean(effective_rank(memory), real, axis=0)}
