"""From the layers' statistics to the arrays that are plotted and watched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from plait.models.config import LMConfig
from plait.models.mixers.stats import Stats

_SKIPPED = ("auxiliary_loss", "attention")


def probe_arrays(stats: Sequence[Stats]) -> dict[str, np.ndarray]:
    """Each statistic as one float32 array `[L, ...]`; heads that narrower layers lack are NaN, as are layers without it."""
    host = jax.device_get(list(stats))
    arrays = {}
    for field in dataclasses.fields(Stats):
        values = [getattr(s, field.name) for s in host]
        present = [v for v in values if v is not None]
        if present and field.name not in _SKIPPED:
            arrays[field.name] = padded_layers(values, tuple(np.max([v.shape for v in present], axis=0)))
    return arrays


def probe_metrics(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """The model's attention in a few scalars."""
    named: dict[str, tuple[str, Callable[[np.ndarray], Any]]] = {
        "attn/entropy_mean": ("entropy", np.nanmean),
        "attn/entropy_ratio": ("entropy_ratio", np.nanmean),
        "attn/sink_rate": ("sink_rate", np.nanmean),
        "attn/max_logit": ("max_logit", np.nanmax),
        "attn/decay_horizon": ("decay_horizon", np.nanmedian),
        "moh/max_load": ("head_load", _max_routed),
        "residual/max": ("residual_top", np.nanmax),
    }
    return {metric: float(reduce(arrays[name])) for metric, (name, reduce) in named.items() if name in arrays}


def describe_layers(config: LMConfig) -> list[dict[str, Any]]:
    """What each layer is, for `probes/layers.json`."""
    return [
        {"index": i, "mixer": name, "kind": mixer.kind, "num_heads": mixer.head_count(config.d_model)}
        for i, (name, mixer) in enumerate(zip(config.layers, config.layer_mixers, strict=True))
    ]


def _max_routed(load: np.ndarray) -> float:
    routed = np.where(load < 1.0, load, np.nan)
    return float(np.nanmax(routed)) if np.isfinite(routed).any() else 1.0


def padded_layers(values: Sequence[np.ndarray | None], shape: tuple[int, ...]) -> np.ndarray:
    """One float32 array `[L, *shape]` of the layers' arrays, NaN where a layer has none or is smaller."""
    out = np.full((len(values), *shape), np.nan, np.float32)
    for index, value in enumerate(values):
        if value is not None:
            out[index, ...][tuple(slice(n) for n in value.shape)] = value
    return out
