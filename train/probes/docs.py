"""Rows of the documentation's tables, from what probes and watchers declare."""

from __future__ import annotations

from plait.configs.spike import SpikeConfig
from plait.train.probes.base import chosen, statistics
from plait.train.watching.spikes import LossSpikes, SpikeWatch
from plait.train.watching.watchers import Watcher

STATISTIC_HEAD = ("statistic", "of each", "unit", "meaning")
METRIC_HEAD = ("metric", "definition")
EVENT_HEAD = ("kind", "limits", "when")


def every_watcher() -> list[Watcher]:
    """Those of all probes, and the loop's own."""
    return [*(watcher for probe in chosen() for watcher in probe.watchers(())), LossSpikes(), SpikeWatch(SpikeConfig())]


def statistic_rows() -> list[list[str]]:
    """Statistics, with the length of a trailing axis where they have one."""
    return [
        [f"`{name}`", one.per + (", several" if one.size else " and source" if one.by_source else ""), one.unit, one.meaning]
        for name, one in statistics().items()
    ]


def metric_rows() -> list[list[str]]:
    """Metrics of probe steps."""
    return [
        [f"`{one.metric.name}{'/source/NAME' if one.by_source else ''}`", f"`{name}`: {one.metric.meaning}"]
        for name, one in statistics().items()
        if one.metric is not None
    ]


def event_rows() -> list[list[str]]:
    """Kinds of events, with the limits of those that a threshold makes."""
    rows = []
    for watcher in every_watcher():
        for kind, when in watcher.kinds.items():
            rows.append([f"`{kind}`", ", ".join(f"{limit:g}" for limit in watcher.limits.get(kind, ())), when])
    return rows
