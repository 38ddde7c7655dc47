"""From the layers' statistics to the arrays that are plotted and watched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from plait.models.config import LMConfig
from plait.train.probes.base import GradientProbe, Probe, Probes, statistics
from plait.train.state import Blueprint


def probe_arrays(layers: Sequence[Mapping[str, jax.Array]]) -> dict[str, np.ndarray]:
    """Each statistic as one float32 array `[L, ...]`; heads that narrower layers lack are NaN, as are layers without it."""
    host = jax.device_get(list(layers))
    arrays = {}
    for name in dict.fromkeys(name for layer in host for name in layer):
        values = [layer.get(name) for layer in host]
        shape = tuple(np.max([v.shape for v in values if v is not None], axis=0).astype(int))
        arrays[name] = padded_layers(values, shape)
    return arrays


def told(blueprint: Blueprint, observer: Probes) -> list[set[str]]:
    """The names of the statistics that each layer of a model tells; those of gradients are of all."""
    layers = jax.eval_shape(observer.across, [one.statistics for one in blueprint.extras(observer)])
    of_gradients = statistics([probe for probe in observer.probes if isinstance(probe, GradientProbe)])
    return [{*layer, *of_gradients} for layer in layers]


def probe_metrics(
    arrays: Mapping[str, np.ndarray], probes: Sequence[Probe], kinds: Sequence[str] = (), sources: Sequence[str] = ()
) -> dict[str, float]:
    """The metrics of the probes' statistics that have a value.

    Args:
        arrays: of each statistic, `[L, ...]`.
        probes: which declare them.
        kinds: what each layer is told of as: where there are several, those of `attn/` are also told for the layers of each, as
            `attn/linear/entropy_mean`.
        sources: of a mixture: what is by source is told of each, as `attn/dormant_share/source/web`.
    """
    declared = statistics(probes)
    known = {name: (metric, one) for name, one in declared.items() if name in arrays and (metric := one.metric) is not None}
    metrics = {metric: arrays[name] for name, (metric, one) in known.items() if not one.by_source}
    by_source = {
        f"{metric.name}/source/{source}": (metric, arrays[name][..., index])
        for name, (metric, one) in known.items()
        if one.by_source
        for index, source in enumerate(sources)
    }
    whole = {metric.name: (metric, values) for metric, values in metrics.items()}
    by_kind = {
        kind_name(metric.name, kind): (metric, values[[index for index, one in enumerate(kinds) if one == kind]])
        for metric, values in metrics.items()
        for kind in (sorted(set(kinds)) if len(set(kinds)) > 1 and metric.name.startswith(ATTENTION) else ())
    }
    there = {name: one for name, one in (whole | by_kind | by_source).items() if not np.isnan(one[1]).all()}
    return {name: float(metric.reduce(values)) for name, (metric, values) in there.items()}


ATTENTION = "attn/"
"""Begins the names of metrics of what attention does."""


_TOLD = {"entropy_ratio": "entropy", "sink_rate": "sinks"}
"""Of metrics of attention, those that a line about training has room for, in words."""


def attention_by_kind(latest: Mapping[str, float]) -> list[str]:
    """How even attention is and where it has sinks, of each kind of layer, or of all where they are of one: `full: entropy 0.88`."""
    kinds = sorted({name.split("/")[1] for name in latest if name.startswith(ATTENTION) and name.count("/") == 2})
    found = []
    for kind in kinds or [""]:
        values = {
            words: latest.get(kind_name(ATTENTION + name, kind) if kind else ATTENTION + name) for name, words in _TOLD.items()
        }
        if told := [f"{words} {value:.2f}" for words, value in values.items() if value is not None and math.isfinite(value)]:
            found.append(f"{kind or 'attention'}: {', '.join(told)}")
    return found


def kind_name(metric: str, kind: str) -> str:
    """The metric's name for the layers of a kind."""
    return f"{ATTENTION}{kind}/{metric.removeprefix(ATTENTION)}"


def describe_layers(config: LMConfig) -> list[dict[str, Any]]:
    """What each layer is, for `probes/layers.json`."""
    described = []
    for index, (name, mixer) in enumerate(zip(config.layers, config.layer_mixers, strict=True)):
        kinds = list(mixer.head_kinds(config.d_model))
        described.append({"index": index, "mixer": name, "kind": mixer.told_as, "num_heads": len(kinds), "head_kinds": kinds})
    return described


def padded_layers(values: Sequence[np.ndarray | None], shape: tuple[int, ...]) -> np.ndarray:
    """One float32 array `[L, *shape]` of the layers' arrays, NaN where a layer has none or is smaller."""
    out = np.full((len(values), *shape), np.nan, np.float32)
    for index, value in enumerate(values):
        if value is not None:
            out[index, ...][tuple(slice(n) for n in value.shape)] = value
    return out
