"""The rhythm of attention: how far back local heads look, and which tokens later queries of global heads come back to."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from plait.configs.probe import ProbeConfig
from plait.train.probes.base import Probe, register
from plait.train.probes.first_tokens import TOKENS, begins_whole, first_maps
from plait.train.probes.means import masked_mean
from plait.train.probes.statistic import Metric, Panel, Statistic

SHARE = 0.3
"""Of all heads: the local ones, and the global ones."""
_SECTION = "Distance of attention"
_OF_THE_MODEL = f"on the first {TOKENS} tokens; one value of the model, at its last layer"


@register("waad_fai", source="Attention Illuminates LLM Reasoning (2510.13554); window and horizons are options of the run")
@dataclasses.dataclass(frozen=True, kw_only=True)
class WaadFai(Probe):
    """Windowed average attention distance of the model's local heads, and future attention influence in its global ones."""

    by_default = False
    title = "WAAD and FAI"
    statistics = (
        Statistic(
            name="waad",
            per="layer",
            unit="tokens",
            meaning=f"mean over queries of WAAD, how far back the 30 % most local heads look, cut off at `probe.waad_window`, {_OF_THE_MODEL}",
            metric=Metric(name="attn/waad", reduce=np.nanmax, meaning="of the model"),
            panel=Panel(title="WAAD", section=_SECTION, lines=True),
        ),
        Statistic(
            name="waad_peak",
            per="layer",
            unit="tokens",
            meaning="the largest WAAD of a query, mean over sequences",
            panel=Panel(title="Peak of WAAD", section=_SECTION, lines=True),
        ),
        Statistic(
            name="fai_peak",
            per="layer",
            unit="share",
            meaning="the largest FAI of a token, mean over sequences: what the 30 % most global heads give to it from queries "
            f"`probe.fai_from` to `probe.fai_to` later, {_OF_THE_MODEL}",
            metric=Metric(name="attn/fai_peak", reduce=np.nanmax, meaning="of the model"),
            panel=Panel(title="Peak of FAI", section=_SECTION, lines=True),
        ),
    )

    def measure(self, look, config):
        return {}

    def parts(self, looks, config):
        maps = [one for one in map(first_maps, looks) if one is not None]
        if not maps:
            return {}
        a, whole = jnp.concatenate(maps, axis=1), begins_whole(looks[0])  # [B, H, T, S]
        lag = np.maximum(np.subtract.outer(np.arange(TOKENS), np.arange(TOKENS)), 0)
        later = _later(config)
        return {
            "whole": whole,
            "distance": masked_mean((a * lag[None, None]).sum(-1).mean(-1), whole[:, None], axis=0),  # [H]
            "waad": (a * np.minimum(lag, config.waad_window)[None, None]).sum(-1),  # [B, H, T]
            "fai": (a * later[None, None]).sum(-2) / np.maximum(later.sum(0), 1)[None, None],  # [B, H, S]
        }

    def across(self, layers, config):
        there = [part for part in layers if part]
        distance = jnp.concatenate([part["distance"] for part in there])
        waad, fai = (jnp.concatenate([part[name] for part in there], axis=1) for name in ("waad", "fai"))
        count, order, whole = max(1, round(SHARE * distance.size)), jnp.argsort(distance), there[0]["whole"]
        local, wide = waad[:, order[:count]].mean(1), fai[:, order[-count:]].mean(1)
        mean = lambda x: jnp.where(whole.any(), masked_mean(x, whole, axis=0), jnp.nan)
        found = {"waad": mean(local.mean(-1)), "waad_peak": mean(local.max(-1))}
        if _later(config).any():
            found["fai_peak"] = mean(wide.max(-1))
        return [*[{}] * (len(layers) - 1), found]


def _later(config: ProbeConfig) -> np.ndarray:
    """float32 `[T, S]`: 1 where the query t is one of those whose attention is the future attention of token s."""
    lag = np.subtract.outer(np.arange(TOKENS), np.arange(TOKENS))
    return ((lag >= config.fai_from) & (lag <= config.fai_to)).astype(np.float32)
