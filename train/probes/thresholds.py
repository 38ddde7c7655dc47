"""The watcher of a statistic that has an event, and what watchers of probes share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from plait.models.mixers.base import HeadKind
from plait.train.probes.statistic import Statistic
from plait.train.watching.watchers import Event, Values, Watcher


class ThresholdWatcher(Watcher):
    """Finds the events of one statistic.

    Args:
      statistic: one with an event.
      layers: the entries of `probes/layers.json`; without them layers are named by their index and all heads attend.
    """

    fields = ("seen", "fired", "held")

    def __init__(self, statistic: Statistic, layers: Sequence[Mapping[str, Any]] = ()):
        assert statistic.event is not None
        self.statistic, self.event, self.layers = statistic, statistic.event, layers
        self.name = statistic.name
        self.kinds = {self.event.kind: self.event.meaning}
        self.limits = {self.event.kind: self.event.limits}
        if statistic.panel is not None and statistic.panel.limits is not None:
            self.bounded = {self.event.kind: statistic.panel.limits}
        if self.event.start_kind is not None:
            self.kinds[self.event.start_kind] = (
                f"the same already at the first probe; no `{self.event.kind}` before it has clearly gone"
            )
        self.seen = False
        """Whether there was a probe."""
        self.fired: list[str] = []
        self.held: list[str] = []
        """What has held since the first probe."""

    def sees(self, told: Sequence[Collection[str]]) -> bool:
        heads = self.event.heads
        layers = self.layers or [{"head_kinds": [heads]}] * len(told)
        return any(self.name in names and (heads is None or heads in layer["head_kinds"]) for names, layer in zip(told, layers))

    def update(self, step: int, values: Values) -> list[Event]:
        if self.name not in values:
            return []
        event, found = self.event, []
        limits = self.limits[event.kind]
        first, self.seen = not self.seen, True
        for place, layer, head, value in self._places(np.asarray(values[self.name], np.float64)):
            for limit in limits:
                key = place if len(limits) == 1 else f"{place}/{limit:g}"
                above = value < limit if event.below else value > limit
                gone = value > limit / event.release if event.below else value < limit * event.release
                if not self._tells(key, above, gone, first):
                    continue
                words = {"where": place_name(self.layers, layer, head), "value": value, "limit": limit}
                message = event.message.format(**words)
                if first:
                    message = event.start_message.format(message=message, **words)
                if layer is not None:
                    message += event.note(values, layer, head)
                kind = event.start_kind if first and event.start_kind is not None else event.kind
                found.append(Event(step, kind, layer, head, value, limit, message))
        return found

    def _places(self, values: np.ndarray) -> list[tuple[str, int | None, int | None, float]]:
        """Key, layer, head and value of all that is looked at."""
        heads = self.statistic.by_head(values)
        if self.event.heads is not None:
            heads = np.where(heads_of(self.layers, self.event.heads, heads.shape), heads, np.nan)
        if self.event.per == "model":
            return [("model", None, None, mean(heads))]
        if self.statistic.per == "layer":
            return [(f"{layer}", layer, None, float(value)) for layer, value in enumerate(heads[:, 0])]
        if self.event.per == "head":
            return [(f"{layer}/{head}", layer, head, float(value)) for (layer, head), value in np.ndenumerate(heads)]
        furthest = np.nanargmin if self.event.below else np.nanargmax
        there = [(layer, int(furthest(row))) for layer, row in enumerate(heads) if not np.isnan(row).all()]
        return [(f"{layer}", layer, head, float(heads[layer, head])) for layer, head in there]

    def _tells(self, key: str, holds: bool, gone: bool, first: bool) -> bool:
        """Whether there is something to say of a place."""
        if self.event.start_kind is not None:
            if holds and first:
                self.held = [*self.held, key]
                return True
            if gone:
                self.held = [other for other in self.held if other != key]
            holds = holds and key not in self.held
        new = holds and key not in self.fired
        if new:
            self.fired = [*self.fired, key]
        return new


def place_name(layers: Sequence[Mapping[str, Any]], layer: int | None, head: int | None) -> str:
    """A head or layer in words."""
    if layer is None:
        return "the model"
    mixer = f" ({layers[layer]['mixer']})" if layer < len(layers) else ""
    return f"layer {layer}{mixer}" + ("" if head is None else f" head {head}")


def heads_of(layers: Sequence[Mapping[str, Any]], kind: HeadKind, shape: tuple[int, ...]) -> np.ndarray:
    """bool `[L, H]`: which heads are of a kind; those of which nothing is known attend."""
    found = np.full(shape, kind == "attention")
    for row, layer in zip(found, layers):
        known = [one == kind for one in layer["head_kinds"]][: len(row)]
        row[: len(known)] = known
    return found


def mean(values: np.ndarray) -> float:
    """Of the finite ones; NaN where there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")
