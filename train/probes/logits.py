"""How large attention logits grow."""

from __future__ import annotations

import dataclasses

import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.statistic import Metric, Panel, Statistic, Threshold


@register("logits", source="Small-scale proxies for large-scale Transformer training instabilities (2309.14322)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Logits(Probe):
    """The largest logit, of all queries."""

    statistics = (
        Statistic(
            name="max_logit",
            per="head",
            unit="before the softmax",
            meaning="largest attention logit of the probed sequences, all queries (softmax and sigmoid layers)",
            metric=Metric(name="attn/max_logit", reduce=np.nanmax, meaning="the largest of all heads"),
            panel=Panel(title="Largest logit", section="Extreme values", lines=True, most=True),
            event=Threshold(
                kind="logit_growth",
                limits=(50.0, 1e2, 1e3, 1e4),
                per="layer",
                meaning="a layer's largest attention logit passes the next limit",
                message="the largest attention logit of {where} is {value:.3g}, above {limit:g}",
            ),
        ),
    )

    def measure(self, look, config):
        return {"max_logit": look.max_logits}

    def summary(self, run):
        logits = run.by_head("max_logit")
        return None if logits is None else f"The largest attention logit seen is {np.nanmax(logits):.3g}."
