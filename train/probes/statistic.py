"""Statistics: what a probe measures, declared once with how metrics, report, events and docs take it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from plait.configs.probe import ProbeConfig
from plait.models.mixers.base import HeadKind
from plait.train.watching.watchers import Values


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
    """Looked at in each head, in the largest (or smallest) head of a layer, or as the mean of all heads."""
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
    by_source: bool = False
    """A trailing axis of a mixture's sources, as its config names them: a metric of each, `METRIC/source/NAME`, and pictures of each."""
    metric: Metric | None = None
    panel: Panel | None = None
    event: Threshold | None = None

    def shape(self, heads: int, config: ProbeConfig, sources: int = 0) -> tuple[int, ...]:
        """That of a layer's value."""
        trailing = () if self.size is None else (self.size(config),)
        return (heads,) * (self.per == "head") + trailing + (sources,) * self.by_source

    def by_head(self, values: np.ndarray) -> np.ndarray:
        """`[..., L, H]` of its values over layers: first entries, and one head for what is of the layer."""
        values = values if self.size is None and not self.by_source else values[..., 0]
        return values if self.per == "head" else values[..., None]
