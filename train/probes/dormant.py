"""Which heads rest on the sink."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.means import looked_at, mean_of_rows, off_sink
from plait.train.probes.statistic import Metric, Panel, Statistic, Threshold

MOST = 0.5
"""Share of a query's weight on the sink above which the head rests there; the paper draws no line."""


@register("dormant", source="Active-Dormant Attention Heads (2410.13835)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dormant(Probe):
    """How often a head is dormant: most of a query's weight is on its document's first token, or on a sink logit."""

    by_default = False
    statistics = (
        Statistic(
            name="dormant_share",
            per="head",
            unit="share of queries",
            meaning=f"queries after the first that give more than {MOST} of their weight to the document's first token and the sink logit",
            metric=Metric(name="attn/dormant_share", reduce=np.nanmean, meaning="mean over heads and layers"),
            panel=Panel(title="Dormant share", section="Specialisation of heads", map=True, limits=(0, 1)),
            event=Threshold(
                kind="dormancy",
                limits=(0.9,),
                meaning="a head is dormant for a larger share of queries than the limit",
                message="{where} went dormant: {value:.0%} of its queries rest on the sink",
                start_kind="dormant_at_start",
            ),
        ),
    )

    def measure(self, look, config):
        gates = off_sink(look)
        return {} if gates is None else {"dormant_share": mean_of_rows((gates < 1 - MOST).astype(jnp.float32), looked_at(look))}
