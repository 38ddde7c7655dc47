"""By how much logits prefer first tokens."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.means import looked_at, mean_of_rows, upto
from plait.train.probes.statistic import Metric, Panel, Statistic


@register("sink_logit", source="Active-Dormant Attention Heads (2410.13835), the first of the three extreme-token phenomena")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SinkLogit(Probe):
    """The looked-at queries' products with their document's first key against those with its other keys up to the query."""

    by_default = False
    statistics = (
        Statistic(
            name="sink_logit",
            per="head",
            unit="before the softmax",
            meaning="scaled product of query and first key less the mean of those with the document's other keys up to the query, mean over "
            "queries (softmax layers)",
            metric=Metric(name="attn/sink_logit", reduce=np.nanmax, meaning="the largest of all heads"),
            panel=Panel(title="Sink logit", section="Extreme values", lines=True, most=True),
        ),
    )

    def measure(self, look, config):
        if "logits" not in look.observed:
            return {}
        q, k, scale = look.observed["logits"]
        keys = upto(look)  # [B, R, S]
        first = keys & (look.at.positions == 0)[:, None, :]
        others = (keys & ~first).astype(jnp.float32)
        by_key = first.astype(jnp.float32) - others / jnp.maximum(others.sum(-1, keepdims=True), 1.0)
        difference = jnp.einsum("brs,bsgk->brgk", by_key, k.astype(jnp.float32))  # of the first key and the mean of others
        grouped = q[:, look.rows].reshape(*difference.shape[:3], -1, q.shape[-1]).astype(jnp.float32)
        logit = scale * jnp.einsum("brghk,brgk->bghr", grouped, difference)
        logit = logit.reshape(q.shape[0], q.shape[2], -1)  # [B, H, R]
        return {"sink_logit": mean_of_rows(logit, looked_at(look))}
