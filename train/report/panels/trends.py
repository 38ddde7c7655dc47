"""Statistics over training steps as their panels say: one line for each kind of head, one for each layer, or one for each run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from plait.train.probes.statistic import Panel, Statistic
from plait.train.report.panels import seeds
from plait.train.report.run import Group, Run
from plait.train.report.style import (
    MUTED,
    Picture,
    colour_bar,
    depth_colours,
    group_dash,
    kind_colour,
    panels,
    picture,
    step_axis,
    title,
    value_axis,
)


def of_kinds(name: str, runs: Sequence[Run], shown: Sequence[Statistic]) -> Picture | None:
    """A panel for each trend of the statistics, a line for each kind of head and run; None where there is none."""
    trends = [(statistic, trend) for statistic in shown if statistic.panel is not None for trend in statistic.panel.trends]
    if not trends:
        return None
    figure, axes = panels(len(trends), columns=min(3, max(2, len(trends))), height=2.5, gap=(0.72, 0.8))
    present: dict[str, Group] = {}
    for ax, (statistic, trend) in zip(axes, trends):
        lines: dict[str, dict[int, np.ndarray]] = {}
        for index, run in enumerate(runs):
            for group, values in run.by_group(statistic.name).items():
                present.setdefault(group.words, group)
                line = [trend.reduce(step[np.isfinite(step)]) if np.isfinite(step).any() else math.nan for step in values]
                lines.setdefault(group.words, {})[index] = np.array(line)
        _by_kind(ax, runs, lines, present)
        if trend.limit is not None:
            ax.axhline(trend.limit, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        limits = statistic.panel.limits if statistic.panel is not None else None
        room = 0.02 * (limits[1] - limits[0]) if limits else 0
        title(ax, trend.title)
        ax.set(ylabel=trend.unit, **({"ylim": (limits[0] - room, limits[1] + room)} if limits else {}))
        value_axis(ax)
        step_axis(ax)
    ink = kind_colour if len(runs) == 1 else (lambda kind: MUTED)
    handles = [Line2D([], [], color=ink(group.kind), linestyle=group_dash(group), linewidth=1.8) for group in present.values()]
    if len(runs) > 1:
        seeds.legend(axes[0], runs, handles, list(present))
    else:
        axes[0].legend(handles, list(present), loc="best", handlelength=2.2)
    return picture(name, figure, "Every kind of head on one scale; dotted, the threshold of an event.")


def _by_kind(ax: Axes, runs: Sequence[Run], lines: Mapping[str, Mapping[int, np.ndarray]], present: Mapping[str, Group]) -> None:
    """Lines of runs for each kind of head: the dashes are the kind's, and so is the colour where there is one run."""
    for words, of in lines.items():
        group = present[words]
        style = {"linestyle": group_dash(group), **({"color": kind_colour(group.kind)} if len(runs) == 1 else {})}
        seeds.draw(ax, runs, {index: (np.asarray(runs[index].probes.steps), line) for index, line in of.items()}, **style)


def of_layers(name: str, runs: Sequence[Run], shown: Sequence[Statistic]) -> Picture | None:
    """A panel for each statistic with lines: one for every layer, or one for each run; None where there is none."""
    lines = [(statistic, statistic.panel) for statistic in shown if statistic.panel is not None and statistic.panel.lines]
    if not lines:
        return None
    figure, axes = panels(len(lines), columns=min(4, max(2, len(lines))), height=2.3, gap=(0.66, 0.8), margin=(0.45, 0.5))
    present: dict[str, Group] = {}
    for ax, (statistic, panel) in zip(axes, lines):
        if len(runs) == 1:
            _layers(ax, runs[0], statistic, panel)
        else:
            drawn: dict[str, dict[int, np.ndarray]] = {}
            for index, run in enumerate(runs):
                for group, values in run.by_group(statistic.name).items():
                    present.setdefault(group.words, group)
                    drawn.setdefault(group.words, {})[index] = levels(values.reshape(len(values), -1), panel)
            _by_kind(ax, runs, drawn, present)
        title(ax, panel.title, size=8.5, beside=0.37 if len(runs) == 1 else 0)
        ax.set_ylabel(statistic.unit + (f", {'max' if panel.most else 'median'}" if len(runs) > 1 else ""), fontsize=7.5)
        value_axis(ax, log=panel.log and all(np.nanmin(line.get_ydata()) > 0 for line in ax.lines))
        step_axis(ax)
    if len(runs) > 1:
        kinds = {words: group for words, group in present.items() if words}
        handles = [Line2D([], [], color=MUTED, linestyle=group_dash(group), linewidth=1.8) for group in kinds.values()]
        seeds.legend(axes[0], runs, handles, list(kinds))
        caption = "One line for each run and kind of head: the median or the maximum over its layers and heads, as the axis says."
        return picture(name, figure, caption)
    largest = [panel.title.lower() for statistic, panel in lines if panel.most and statistic.per == "head"]
    caption = "One line for each layer, coloured by depth: the median over its heads"
    caption += f", for {' and '.join(largest)} the maximum. " if largest else ". "
    caption += "A layer with heads of both kinds has a line for each, those that read a state dotted."
    return picture(name, figure, caption)


def _layers(ax: Axes, run: Run, statistic: Statistic, panel: Panel) -> None:
    colours, scale = depth_colours(len(run.layers))
    for group, values in run.by_group(statistic.name).items():
        for layer, colour in enumerate(colours):
            if np.isfinite(values[:, layer]).any():
                line = levels(values[:, layer], panel)
                style = {
                    "linestyle": group_dash(group) if _has_both(run, layer) else "-",
                    "linewidth": 1.3,
                    "marker": _marker(line),
                }
                ax.plot(run.probes.steps, line, color=colour, **style)
    bar = colour_bar(ax, scale, ticks=[0, len(colours) - 1] if len(colours) > 1 else [0], width=0.2)
    bar.text(-0.12, 0.5, "layer", transform=bar.transAxes, ha="right", va="center", fontsize=7, color=MUTED)


def _has_both(run: Run, layer: int) -> bool:
    return len(set(run.layers[layer]["head_kinds"])) > 1


def levels(values: np.ndarray, panel: Panel) -> np.ndarray:
    """The largest or the median of the finite values `[N, n]` at each of N steps, NaN where there is none."""
    finite = np.where(np.isfinite(values), values, np.nan)
    some = np.isfinite(finite).any(1)
    found = np.full(len(values), np.nan)
    found[some] = (np.nanmax if panel.most else np.nanmedian)(finite[some], axis=1)
    return found


def _marker(line: Sequence[float] | np.ndarray) -> str | None:
    return "o" if len(line) == 1 else None
