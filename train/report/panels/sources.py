"""Statistics by source of a mixture: how each went, and every head at the end."""

from collections.abc import Sequence

import numpy as np
from matplotlib.lines import Line2D

from plait.train.probes.statistic import Statistic
from plait.train.report.panels.maps import colours, layer_by_head, scale
from plait.train.report.run import Run
from plait.train.report.style import (
    Picture,
    colour_bar,
    panels,
    picture,
    run_colour,
    run_dash,
    step_axis,
    title,
    value_axis,
)


def over_time(name: str, runs: Sequence[Run], shown: Sequence[Statistic]) -> Picture | None:
    """A panel for each statistic and run, a line for each source: the mean over heads; None where no run has any."""
    cells = [(run, one, run.probes.arrays[one.name]) for one in shown for run in runs if _there(run, one)]
    if not cells:
        return None
    figure, axes = panels(len(cells), columns=min(3, max(2, len(cells))), height=2.3, gap=(0.72, 0.8), margin=(0.45, 0.5))
    for ax, (run, one, values) in zip(axes, cells):
        assert one.panel is not None
        names = run.sources(values.shape[-1])
        for index in range(len(names)):
            line = _mean(values[..., index])
            told = np.isfinite(line)  # not every source is looked at each time
            style = {"color": run_colour(index), "linestyle": run_dash(index), "marker": "o" if told.sum() == 1 else None}
            ax.plot(run.probes.steps[told], line[told], **style)
        handles = [Line2D([], [], color=run_colour(index), linestyle=run_dash(index)) for index in range(len(names))]
        ax.legend(handles, names, loc="best", handlelength=2.2)
        title(ax, one.panel.title if len(runs) == 1 else f"{one.panel.title}, {run.name}", size=8.5)
        ax.set(ylabel=f"{one.unit}, mean", **({"ylim": one.panel.limits} if one.panel.limits else {}))
        value_axis(ax)
        step_axis(ax)
    return picture(
        name, figure, "One line for each source of the mixture: the mean over heads, of the steps that looked at rows of it."
    )


def at_the_end(name: str, runs: Sequence[Run], one: Statistic) -> Picture | None:
    """Layer x head for each source and run, of the last probe step that looked at rows of the source; None where no run has any."""
    cells = [
        (run, source, _last(run.probes.arrays[one.name][..., index]))
        for run in runs
        if _there(run, one)
        for index, source in enumerate(run.sources(run.probes.arrays[one.name].shape[-1]))
    ]
    if not cells or one.panel is None:
        return None
    norm, columns = scale(one.panel, [matrix for *_, matrix in cells]), 4
    height = float(np.clip(0.16 * max(len(run.layers) for run in runs), 0.7, 4.0))
    figure, axes = panels(len(cells), columns=columns, height=height, left=0.5, gap=(0.42, 0.85), margin=(0.62, 0.42))
    for index, (ax, (run, source, matrix)) in enumerate(zip(axes, cells)):
        image = ax.imshow(matrix, aspect="auto", cmap=colours(one.panel), norm=norm, interpolation="nearest")
        layer_by_head(ax, run, matrix, first=index % columns == 0, label="head")
        colour_bar(ax, image)
        title(ax, source if len(runs) == 1 else f"{source}, {run.name}", size=8.5, beside=0.38)
    caption = f"{one.panel.title}, one panel for each source of the mixture, of the last probe step that looked at rows of it. Rows are "
    caption += (
        "layers, columns heads: a head that is dark in one panel and pale in another rests on one source and works on the other."
    )
    return picture(name, figure, caption)


def _there(run: Run, one: Statistic) -> bool:
    values = run.probes.arrays.get(one.name)
    return values is not None and bool(np.isfinite(values).any())


def _mean(values: np.ndarray) -> np.ndarray:
    """Over layers and heads of `[N, L, H]`, NaN where there is no value."""
    told = np.isfinite(values)
    count = told.sum((1, 2))
    return np.where(count > 0, np.where(told, values, 0).sum((1, 2)) / np.maximum(count, 1), np.nan)


def _last(values: np.ndarray) -> np.ndarray:
    """The last of `[N, L, H]` that has a value."""
    steps = np.flatnonzero(np.isfinite(values).any((1, 2)))
    return values[steps[-1] if len(steps) else -1]
