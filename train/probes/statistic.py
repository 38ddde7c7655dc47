"""Statistics: what a probe measures, declared once with how metrics, report, events and docs take it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from plait.configs.probe import ProbeConfig
from plait.models.mixers.base import HeadKind
from plait.train.watchers import Event, Values, Watcher


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A statistic of all layers and heads as one number."""

    name: str
    """Under which metrics hold it, as `attn/max_logit`."""
    reduce: Callable[[np.ndarray], Any]
    """Of the array over layers and heads, NaN where there is none."""
    meaning: str
    """Its line in the docs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trend:
    """A number of each kind of head over training."""

    title: str
    unit: str
    reduce: Callable[[np.ndarray], Any]
    """Of the values `[n]` of the kind's heads, all finite."""
    limit: float | None = None
    """Drawn as a dotted line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """How the report draws a statistic, besides layer x head at the end."""

    title: str
    section: str
    """Heading under which it stands, with others of the same."""
    trends: tuple[Trend, ...] = ()
    """Lines over steps, one a kind of heads."""
    lines: bool = False
    """A line over steps for each layer."""
    map: bool = False
    """Head x step."""
    by_entry: str | None = None
    """Title of a picture of layer x entry of the trailing axis, the largest of a layer's heads."""
    most: bool = False
    """A layer's line, and a run's among several, is the largest of its heads; the median else."""
    log: bool = False
    """Logarithmic scale."""
    limits: tuple[float, float] | None = None
    """Ends of the scale; None: those of the values."""
    low_is_dark: bool = False
    """Small values are what one looks for."""
    compared: bool = True
    """Maps are shown in comparisons of runs too."""
    column: tuple[str, Callable[[np.ndarray], str]] | None = None
    """Heading and text, of the values `[L, H]` at the end, in the table that compares runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    """When a statistic makes an event: once for each place and limit. Of a statistic with a trailing axis its first entry counts."""

    kind: str
    """Of the event, as `sink_onset`."""
    limits: tuple[float, ...]
    """Passed upwards,"""
    below: bool = False
    """or downwards."""
    per: Literal["head", "layer", "model"] = "head"
    """Looked at in each head, in the largest head of a layer, or as the mean of all heads."""
    heads: HeadKind | None = None
    """The kind of heads that is looked at; None: all."""
    meaning: str
    """When it happens: the docs' line."""
    message: str
    """Of the event, with `{where}`, `{value}` and `{limit}`."""
    start_kind: str | None = None
    """The kind of what holds at the first probe already, and so did not emerge: it may become a `kind` only after it has clearly gone.
    None makes no difference."""
    start_message: str = "{message}, already at the first probe"
    """Of what holds at the first probe already; `{message}` is the other one."""
    note: Callable[[Values, int, int | None], str] = lambda values, layer, head: ""
    """Added to the message, of the step's values, layer and head."""
    release: float = 0.8
    """Share of the limit that a value must fall below (or rise above its inverse) to have clearly gone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistic:
    """A number that each layer or head has at a probe step, NaN where one has none."""

    name: str
    per: Literal["layer", "head"]
    unit: str
    meaning: str
    """Its line in the docs and in the report."""
    size: Callable[[ProbeConfig], int] | None = None
    """Length of a trailing axis, of which metrics take all, panels and events the first entry."""
    metric: Metric | None = None
    panel: Panel | None = None
    event: Threshold | None = None

    def shape(self, heads: int, config: ProbeConfig) -> tuple[int, ...]:
        """That of a layer's value."""
        return (heads,) * (self.per == "head") + (() if self.size is None else (self.size(config),))

    def by_head(self, values: np.ndarray) -> np.ndarray:
        """`[..., L, H]` of its values over layers: first entries, and one head for what is of the layer."""
        values = values if self.size is None else values[..., 0]
        return values if self.per == "head" else values[..., None]


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
        if self.event.start_kind is not None:
            self.kinds[self.event.start_kind] = (
                f"the same already at the first probe; no `{self.event.kind}` before it has clearly gone"
            )
        self.seen = False
        """Whether there was a probe."""
        self.fired: list[str] = []
        self.held: list[str] = []
        """What has held since the first probe."""

    def update(self, step: int, values: Values) -> list[Event]:
        if self.name not in values:
            return []
        event, found = self.event, []
        first, self.seen = not self.seen, True
        for place, layer, head, value in self._places(np.asarray(values[self.name], np.float64)):
            for limit in event.limits:
                key = place if len(event.limits) == 1 else f"{place}/{limit:g}"
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
        if self.event.per == "head":
            return [(f"{layer}/{head}", layer, head, float(value)) for (layer, head), value in np.ndenumerate(heads)]
        there = [layer for layer in range(len(heads)) if not np.isnan(heads[layer]).all()]
        largest = [(layer, int(np.nanargmax(heads[layer]))) for layer in there]
        of_head = self.statistic.per == "head"
        return [(f"{layer}", layer, head if of_head else None, float(heads[layer, head])) for layer, head in largest]

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
