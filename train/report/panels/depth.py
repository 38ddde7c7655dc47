"""Statistics of one step over the layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from plait.train.probes.statistic import Statistic
from plait.train.report.panels.seeds import legend
from plait.train.report.panels.trends import levels
from plait.train.report.run import Run
from plait.train.report.style import INK, MUTED, Picture, panels, picture, run_colour, run_dash, title, value_axis


def by_depth(name: str, runs: Sequence[Run], shown: Sequence[Statistic]) -> Picture:
    """A panel for each statistic: a line over the layers for each run, and the heads of a single one as dots."""
    figure, axes = panels(len(shown), columns=min(3, max(2, len(shown))), height=2.3, gap=(0.72, 0.8), margin=(0.45, 0.5))
    for ax, statistic in zip(axes, shown):
        panel = statistic.panel
        assert panel is not None
        for run in runs:
            values = run.by_head(statistic.name)
            if values is None:
                continue
            layers = np.arange(values.shape[1])
            if len(runs) == 1 and statistic.per == "head":
                ax.plot(layers, values[-1], ".", color=MUTED, alpha=0.35, markersize=4, markeredgewidth=0)
            colour = INK if len(runs) == 1 else run_colour(run.place)
            line = levels(values[-1].reshape(values.shape[1], -1), panel)
            ax.plot(layers, line, color=colour, linestyle=run_dash(run.place), marker="o", markersize=2.5)
        title(ax, panel.title, size=8.5)
        of_heads = f", {'max' if panel.most else 'median'}" if statistic.per == "head" else ""
        ax.set_ylabel(statistic.unit + of_heads, fontsize=7.5)
        value_axis(ax, log=panel.log and all(np.nanmin(one.get_ydata()) > 0 for one in ax.lines))
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.set_xlabel("layer")
    if len(runs) > 1:
        legend(axes[0], runs)
    dots = " Dots are heads." if len(runs) == 1 and any(one.per == "head" for one in shown) else ""
    return picture(
        name,
        figure,
        "Layers from the first to the last: the median over the heads of each, or the largest, as the axis says." + dots,
    )
