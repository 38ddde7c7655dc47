"""Whether an answer looks back at what was given or at itself."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.means import mean_of_rows, upto, weights
from plait.train.probes.statistic import Metric, Panel, Statistic


@register("lookback", source="Lookback Lens (2407.07071), on the run's own prompts and answers here")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookback(Probe):
    """The looked-at rows of answers: their mean weight on a token of the prompt against that on a token of the answer."""

    by_default = False
    statistics = (
        Statistic(
            name="lookback_ratio",
            per="head",
            unit="share",
            meaning="mean weight of a prompt's token over the sum of that and of the mean weight of the answer's tokens so far, mean over "
            "queries of answers; in documents that begin with tokens that are not predicted",
            metric=Metric(name="attn/lookback_ratio", reduce=np.nanmean, meaning="mean over heads and layers"),
            panel=Panel(title="Lookback ratio", section="Distance of attention", map=True, limits=(0, 1)),
        ),
    )

    def measure(self, look, config):
        if look.implied is None or look.at.predicted is None:
            return {}
        predicted = look.at.predicted & (look.at.segment_ids > 0)
        before = jnp.cumsum(predicted, axis=1) - predicted  # predictions before each token, in the row
        at_start = lambda x: jnp.take_along_axis(x, look.at.starts(), axis=1)
        answer, prompted = before > at_start(before), ~at_start(predicted)
        keys = upto(look)
        given, new = keys & ~answer[:, None, :], keys & answer[:, None, :]

        def mean(keys: jax.Array) -> jax.Array:  # [B, H, R]
            return (weights(look.implied) * keys[:, None]).sum(-1) / jnp.maximum(keys.sum(-1), 1)[:, None]

        ratio = mean(given) / jnp.maximum(mean(given) + mean(new), 1e-30)
        return {"lookback_ratio": mean_of_rows(ratio, new.any(-1) & prompted[:, look.rows])}
