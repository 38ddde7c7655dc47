"""From the layers' statistics to the arrays that are plotted and watched."""

from __future__ import annotations

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


def probe_metrics(arrays: Mapping[str, np.ndarray], probes: Sequence[Probe]) -> dict[str, float]:
    """The metrics of the probes' statistics that have a value."""
    declared = statistics(probes)
    metrics = {declared[name].metric: values for name, values in arrays.items() if not np.isnan(values).all()}
    return {metric.name: float(metric.reduce(values)) for metric, values in metrics.items() if metric is not None}


def describe_layers(config: LMConfig) -> list[dict[str, Any]]:
    """What each layer is, for `probes/layers.json`."""
    described = []
    for index, (name, mixer) in enumerate(zip(config.layers, config.layer_mixers, strict=True)):
        kinds = list(mixer.head_kinds(config.d_model))
        described.append({"index": index, "mixer": name, "kind": mixer.kind, "num_heads": len(kinds), "head_kinds": kinds})
    return described


def padded_layers(values: Sequence[np.ndarray | None], shape: tuple[int, ...]) -> np.ndarray:
    """One float32 array `[L, *shape]` of the layers' arrays, NaN where a layer has none or is smaller."""
    out = np.full((len(values), *shape), np.nan, np.float32)
    for index, value in enumerate(values):
        if value is not None:
            out[index, ...][tuple(slice(n) for n in value.shape)] = value
    return out
