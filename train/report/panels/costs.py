"""A sweep's metric by what its arms cost, with the front of those that no other beats."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from matplotlib.ticker import FuncFormatter, NullFormatter

from plait.train.report.style import INK, MUTED, Picture, panels, picture, run_colour, title, value_axis
from plait.train.sweep.arms import Arm
from plait.train.sweep.better import Better
from plait.train.sweep.fronts import COSTS, cost, front
from plait.train.sweep.show import quantity

_MOST_NAMED = 6  # arms; of more those on the front are named, so many at most


def of_costs(found: Sequence[Arm], metric: str, better: Better) -> Picture | None:
    """A panel for each cost in which the arms differ; None where they differ in none, or fewer than two have the metric."""
    drawn = [arm for arm in found if arm.values]
    costs = {kind: [cost(arm, kind) for arm in drawn] for kind in COSTS}
    differing = {kind: values for kind, values in costs.items() if len(set(values)) > 1}
    if not differing:
        return None
    figure, axes = panels(len(differing), columns=min(2, len(differing)), height=3.2, gap=(0.72, 0.9), margin=(0.36, 0.6))
    names = names_of(drawn)
    firsts = list(dict.fromkeys(_first(arm) for arm in drawn))
    for ax, (kind, values) in zip(axes, differing.items()):
        points = [(value, arm.estimate.mean) for value, arm in zip(values, drawn)]
        best = front(points, better)
        ax.plot(*zip(*(points[i] for i in best)), color=MUTED, linewidth=1.2, drawstyle="steps-post", zorder=1)
        for i, (arm, (x, y)) in enumerate(zip(drawn, points)):
            half = 0.0 if math.isnan(arm.estimate.half) else arm.estimate.half
            colour = run_colour(firsts.index(_first(arm)))
            ax.errorbar(x, y, half, color=colour, marker="o" if i in best else ".", markersize=6 if i in best else 5, capsize=2)
        for i in range(len(drawn)) if len(drawn) <= _MOST_NAMED else _apart(best, points)[:_MOST_NAMED]:
            right = values[i] > (min(values) + max(values)) / 2
            style = {"textcoords": "offset points", "ha": "right" if right else "left", "fontsize": 7, "color": INK}
            more = sum(points[j] == points[i] for j in best) - 1 if len(drawn) > _MOST_NAMED else 0
            name = f"{names[i]} and {more} more" if more else names[i]
            ax.annotate(name, points[i], xytext=(-5 if right else 5, 5), **style)
        if min(values) > 0 and max(values) >= 4 * min(values):
            ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(quantity))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set(xlabel=COSTS[kind][1], ylabel=metric)
        title(ax, f"{metric} by {COSTS[kind][1]}")
        value_axis(ax)
    told = f"The line is the front: {better} is better, and no arm on it is beaten by one that costs no more."
    return picture("cost", figure, f"Means over seeds, coloured by the first key. {told}")


def _apart(best: Sequence[int], points: Sequence[tuple[float, float]]) -> list[int]:
    """The first of those that stand at the same point."""
    return list({points[i]: i for i in reversed(best)}.values())[::-1]


def names_of(arms: Sequence[Arm]) -> list[str]:
    """Of each arm its value, or where several keys vary what it has that most have not."""
    keys = dict.fromkeys(key for arm in arms for key in arm.keys)
    if len(keys) < 2:
        return [", ".join(map(str, arm.keys.values())) for arm in arms]
    usual = {key: Counter(repr(arm.keys.get(key)) for arm in arms).most_common(1)[0] for key in keys}
    own = lambda arm: [
        f"{key.rpartition('.')[2]}={value}"
        for key, value in arm.keys.items()
        if usual[key][1] < 2 or repr(value) != usual[key][0]
    ]
    return [", ".join(own(arm)) or "as most are" for arm in arms]


def _first(arm: Arm) -> str:
    return next((repr(value) for value in arm.keys.values()), "")
