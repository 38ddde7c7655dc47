"""Whether heads look for what followed the same token before."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.means import masked_mean, weights
from plait.train.probes.statistic import Metric, Panel, Statistic, Threshold, Trend

THRESHOLD = 0.3
"""Score above which a head counts as an induction head; chosen here, the paper draws no line."""
_SECTION = "Induction"


@register("induction", source="In-context Learning and Induction Heads (2209.11895), prefix matching, on the run's own text here")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(Probe):
    """Mean weights of the looked-at rows on the query's previous occurrence, on the token after that, and on the token before the query."""

    statistics = (
        Statistic(
            name="induction",
            per="head",
            unit="share",
            meaning="mean weight on the token after the query token's previous occurrence in the document, by queries that have one; the "
            "token just before the query is none",
            metric=Metric(name="attn/induction", reduce=np.nanmax, meaning="the largest of all heads"),
            panel=Panel(
                title="Induction score",
                section=_SECTION,
                trends=(Trend(title="Strongest induction head", unit="largest score", reduce=np.max, limit=THRESHOLD),),
                map=True,
                most=True,
                limits=(0, 1),
            ),
            event=Threshold(
                kind="induction_onset",
                limits=(THRESHOLD,),
                meaning="a head's induction score rises above the limit",
                message="{where} became an induction head: {value:.2f} of its attention goes to what followed the token before",
                start_kind="induction_at_start",
            ),
        ),
        Statistic(
            name="previous_token",
            per="head",
            unit="share",
            meaning="mean weight on the token before the query in the document, by queries that have one",
            panel=Panel(title="Previous token", section=_SECTION, map=True, limits=(0, 1)),
        ),
        Statistic(
            name="duplicate_token",
            per="head",
            unit="share",
            meaning="mean weight on the query token's previous occurrence in the document itself, by the queries that `induction` has",
            panel=Panel(title="Duplicate token", section=_SECTION, map=True, limits=(0, 1)),
        ),
    )

    def measure(self, look, config):
        if look.implied is None or look.at.ids is None:
            return {}
        ids, segment_ids, rows = look.at.ids, look.at.segment_ids, look.rows
        keys, queries = jnp.arange(ids.shape[1])[None, None, :], rows[None, :, None]
        document = (segment_ids[:, rows, None] == segment_ids[:, None, :]) & (segment_ids[:, None, :] > 0)  # [B, R, S]
        before = document & (ids[:, rows, None] == ids[:, None, :]) & (keys < queries - 1)
        after = jnp.where(before, keys, -1).max(-1, keepdims=True) + 1  # 0 where there is none before

        def score(there: jax.Array) -> jax.Array:  # bool [B, R, S], at most one key a query
            has = there.any(-1)[:, None]
            mean = masked_mean((weights(look.implied) * there[:, None]).sum(-1), has, axis=(0, 2))
            return jnp.where(has.any(), mean, jnp.nan)

        return {
            "induction": score((keys == after) & (after > 0)),
            "previous_token": score(document & (keys == queries - 1)),
            "duplicate_token": score((keys == after - 1) & (after > 0)),
        }
