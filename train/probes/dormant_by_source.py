"""Which heads rest on the sink where the text is of one source and work where it is of another."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import register
from plait.train.probes.dormant import MOST
from plait.train.probes.means import looked_at, off_sink
from plait.train.probes.sources import SourceProbe
from plait.train.probes.statistic import Metric, Panel, Statistic


@register(
    "dormant_by_source",
    source="Active-Dormant Attention Heads (2410.13835), which finds heads dormant on one domain and active on another",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DormantBySource(SourceProbe):
    """How often a head is dormant on the rows of each source of a mixture (`--data.sources`)."""

    title = "Dormancy by source"
    statistics = (
        Statistic(
            name="dormancy_gap",
            per="head",
            unit="share of queries",
            meaning="dormant share of the source on which the head is dormant most, less that of the one on which it is least: near 1 in a "
            "head that works on one source alone",
            metric=Metric(name="attn/dormancy_gap", reduce=np.nanmax, meaning="the largest of all heads"),
            panel=Panel(
                title="Gap of dormancy between sources",
                section="Dormancy by source",
                most=True,
                map=True,
                limits=(0, 1),
            ),
        ),
        Statistic(
            name="dormant_by_source",
            per="head",
            by_source=True,
            unit="share of queries",
            meaning=f"queries of a source that give more than {MOST} of their weight to the document's first token and the sink logit",
            metric=Metric(name="attn/dormant_share", reduce=np.nanmean, meaning="mean over heads and layers"),
            panel=Panel(title="Dormant share by source", section="Dormancy by source", limits=(0, 1)),
        ),
    )

    def sums(self, look, config):
        gates = off_sink(look)
        if gates is None:
            return None
        told = looked_at(look)[:, None]  # [B, 1, R]
        rests = (gates < 1 - MOST) & told
        return jnp.stack([rests.sum(-1), jnp.broadcast_to(told, rests.shape).sum(-1)], axis=-1).astype(jnp.float32)

    def conclude(self, means):
        told = jnp.isfinite(means)
        most, least = (f(jnp.where(told, means, 0 if f is jnp.max else 1), axis=1) for f in (jnp.max, jnp.min))
        return {"dormancy_gap": jnp.where(told.sum(1) > 1, most - least, jnp.nan), "dormant_by_source": means}
