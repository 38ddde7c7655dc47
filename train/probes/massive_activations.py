"""Massive activations: entries of the residual stream far beyond all others."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.residual import absolute_median
from plait.train.probes.statistic import Metric, Panel, Statistic
from plait.train.probes.words import ranges
from plait.train.watching.watchers import Event, Values, Watcher

ACTIVATION = 100.0
"""|x| above which an entry may be massive,"""
RATIO = 1000.0
"""where it is also more than this many times the median |x|."""


@register("massive_activations", source="Massive Activations in Large Language Models (2402.17762), section 2")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MassiveActivations(Probe):
    """How many entries of the residual stream after the block are massive, and in how many channels they are."""

    statistics = (
        Statistic(
            name="massive_activations",
            per="layer",
            unit="entries a sequence",
            meaning=f"entries of the residual stream after the block with |x| > {ACTIVATION:g} and > {RATIO:g} times the median |x|, mean "
            "over sequences",
            metric=Metric(name="residual/massive", reduce=np.nanmax, meaning="of the layer that has most"),
            panel=Panel(title="Massive activations", section="Extreme values", lines=True, most=True),
        ),
        Statistic(
            name="massive_channels",
            per="layer",
            unit="channels",
            meaning="channels with a massive activation in any probed sequence",
            panel=Panel(title="Massive channels", section="Extreme values", lines=True, most=True),
        ),
    )

    def measure(self, look, config):
        real = look.at.segment_ids > 0
        x = jnp.abs(look.residual.astype(jnp.float32))
        massive = real[:, :, None] & (x > ACTIVATION) & (x > RATIO * absolute_median(x, real))
        entries = massive.sum().astype(jnp.float32) / jnp.maximum(real.any(1).sum(), 1)
        return {"massive_activations": entries, "massive_channels": massive.any((0, 1)).sum()}

    def watchers(self, layers):
        return [MassiveWatcher()]

    def summary(self, run):
        if run.by_head("massive_activations") is None and run.by_head("residual_top") is None:
            return None
        layers = [event["layer"] for event in run.events_of(MassiveWatcher.name)]
        return f"Massive activations in layers {ranges(layers)}." if layers else "No massive activations."


class MassiveWatcher(Watcher):
    """The first massive activation after each layer, from the extremes that the residual probe measures: means over sequences."""

    name = "massive_activation"
    fields = ("seen", "fired")

    def __init__(self) -> None:
        criterion = f"`residual_top` is above {ACTIVATION:g} and above {RATIO:g} times `residual_median`"
        self.kinds = {self.name: f"after a layer, {criterion}, both of the probe `residual`"}
        self.seen = False
        self.fired: list[str] = []

    def update(self, step: int, values: Values) -> list[Event]:
        if not {"residual_top", "residual_median"} <= values.keys():
            return []
        first, self.seen = not self.seen, True
        found = []
        for layer, (top, median) in enumerate(zip(values["residual_top"][:, 0], values["residual_median"])):
            if top > ACTIVATION and top > RATIO * median and f"{layer}" not in self.fired:
                self.fired = [*self.fired, f"{layer}"]
                times = f"{top / median:,.0f} times the median" if median > 0 else "with a median of 0"
                when = ", already at the first probe" if first else ""
                text = f"massive activation after layer {layer}: |x| reaches {top:,.0f}, {times}{when}"
                found.append(Event(step, self.name, layer, None, float(top), ACTIVATION, text))
        return found
