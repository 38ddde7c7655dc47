"""Which of several ends best, in a sentence: one that differs from the next by more than seeds do, or none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from plait.train.sweep.arms import LEVEL, Estimate, estimate
from plait.train.sweep.better import Better


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is ranked: runs that differ in seeds alone."""

    name: str
    values: Mapping[Hashable, float]
    """Finite values of the metric, by seeds."""

    @property
    def mean(self) -> float:
        """NaN where there is no value."""
        return float(np.mean(list(self.values.values()))) if self.values else math.nan


def apart(one: Entry, other: Entry) -> Estimate:
    """Of the means, `one` less `other`: over the seeds that both have where these are two or more, else with an unknown interval."""
    paired = estimate(one.values[seeds] - other.values[seeds] for seeds in one.values if seeds in other.values)
    if paired.count > 1:
        return paired
    return Estimate(one.mean - other.mean, math.nan, paired.count)


def ranked(entries: Sequence[Entry], better: Better = "lower") -> list[Entry]:
    """Those with a value, the best first."""
    return sorted((one for one in entries if one.values), key=lambda one: one.mean, reverse=better == "higher")


def verdict(entries: Sequence[Entry], words: str, better: Better = "lower", what: str = "variant") -> str | None:
    """Which entry ends best, and whether that is more than noise; None where fewer than two have a value.

    Args:
      words: of the metric.
      better: whether less of it is, or more.
      what: an entry is called.
    """
    order = ranked(entries, better)
    if len(order) < 2:
        return None
    best, second, last = order[0], order[1], order[-1]
    most, beside, beyond = ("lowest", "below", "above") if better == "lower" else ("highest", "above", "below")
    lead = apart(second, best)
    ahead = lead.mean if better == "lower" else -lead.mean
    pairs = f"a {LEVEL:.0%} interval of ±{lead.half:.3f} over {lead.count} pairs of seeds"
    if not math.isfinite(lead.half):
        text = f"{best.name} has the {most} {words}, {best.mean:.3f}, {ahead:.3f} {beside} the next, {second.name}"
        doubt = "; whether that is more than noise is not known without two seeds or more of both."
    elif lead.half >= ahead:
        text = f"No {what} has the {most} {words} beyond the noise: {best.name}, {best.mean:.3f} in the mean"
        doubt = f", is {ahead:.3f} {beside} {second.name}, with {pairs}."
    else:
        text = f"{best.name} has the {most} {words}, {best.mean:.3f} in the mean, {ahead:.3f} {beside} the next, {second.name}"
        doubt = f" ({pairs.removeprefix('a ').replace(' of ±', ' ±')})."
    if len(order) > 2:
        doubt += f" The last, {last.name}, is {abs(last.mean - best.mean):.3f} {beyond} it."
    return text + doubt
