"""Lines of several runs: one colour a variant; where it has several seeds, each a thin line and their mean a thick one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from plait.train.report.run import Run
from plait.train.report.style import legend_above, run_colour, run_dash
from plait.train.report.variants import variants

Line = tuple[np.ndarray, np.ndarray]
"""Steps, and values at them."""


def draw(
    ax: Axes, runs: Sequence[Run], lines: Mapping[int, Line], thinned: Callable[..., Line] = lambda *line: line, **style: Any
) -> None:
    """The lines of runs, by their place among these. `thinned` leaves out points of what is drawn."""
    means: dict[int, list[Line]] = {}
    for index, (steps, values) in lines.items():
        run = runs[index]
        shown = {"color": run_colour(run.place), "linestyle": run_dash(run.place), "marker": "o" if len(values) == 1 else None}
        thin = {"linewidth": 0.6, "alpha": 0.55} if run.repeats > 1 else {"linewidth": 1.3}
        ax.plot(*thinned(steps, values), **shown | thin | style)
        if run.repeats > 1:
            means.setdefault(run.place, []).append((steps, values))
    for place, several in means.items():
        if len(several) > 1:
            line = mean(several)
            ax.plot(*thinned(*line), **{"color": run_colour(place), "linestyle": run_dash(place), "linewidth": 1.8} | style)


def mean(lines: Sequence[Line]) -> Line:
    """Over the steps that all have, NaN where one has no finite value."""
    steps = lines[0][0]
    for other, _ in lines[1:]:
        steps = np.intersect1d(steps, other)
    at = [dict(zip(own.tolist(), values.tolist(), strict=True)) for own, values in lines]
    return steps, np.array([[values[step] for step in steps.tolist()] for values in at]).reshape(len(lines), -1).mean(0)


def legend(ax: Axes, runs: Sequence[Run], handles: Sequence[Line2D] = (), labels: Sequence[str] = ()) -> None:
    """One entry for each variant above all panels, then the others: in the same colours and order in every figure."""
    found = variants(runs)
    lines = [Line2D([], [], color=run_colour(i), linestyle=run_dash(i), linewidth=2) for i in range(len(found))]
    names = [one.name.lstrip("_") or "run" for one in found]
    legend_above(ax.figure, [*lines[:12], *handles], [*names[:12], *labels])
