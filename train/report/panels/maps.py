"""Heat maps of every head: over training steps, and at the end as layer x head."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm, Normalize

from plait.train.probes.statistic import Panel, Statistic
from plait.train.report.run import Run
from plait.train.report.style import (
    AMOUNT_MAP,
    PAPER,
    Picture,
    blank,
    colour_bar,
    head_of,
    kind_strip,
    panels,
    picture,
    run_colour,
    step_axis,
    title,
)

TALLEST = 8.0  # inches of a map
MOST_ROWS = 480  # of a map, so that each is two pixels high and more
LABEL = 0.11  # inches of a line of small type


def colours(panel: Panel) -> Colormap:
    """Dark is what one looks for."""
    return AMOUNT_MAP.reversed() if panel.low_is_dark else AMOUNT_MAP


def scale(panel: Panel, arrays: Sequence[np.ndarray]) -> Normalize:
    """One colour scale for every map of a statistic."""
    finite = np.concatenate([array[np.isfinite(array)].ravel() for array in arrays])
    if panel.limits or not finite.size:
        return Normalize(*(panel.limits or (0, 1)))
    if panel.log and (finite > 0).any():
        low, high = _leading(finite[finite > 0].min(), np.floor), _leading(finite.max(), np.ceil)
        return LogNorm(low, high if high > low else 2 * low)
    low, high = min(0.0, float(finite.min())), float(finite.max())
    return Normalize(low, high if high > low else low + 1)


def _leading(value: float, rounded: Callable[[float], float]) -> float:
    """A value above 0 with its first digit alone."""
    unit = 10.0 ** np.floor(np.log10(value))
    return float(rounded(value / unit) * unit)


def _ticks(norm: Normalize) -> list[float] | None:
    if isinstance(norm, LogNorm) and norm.vmin and norm.vmax:
        decades = 10.0 ** np.arange(np.ceil(np.log10(norm.vmin) - 1e-6), np.floor(np.log10(norm.vmax) + 1e-6) + 1)
        return [decades[0], decades[-1]] if len(decades) > 1 else [norm.vmin, norm.vmax]
    return [0, 0.5, 1] if (norm.vmin, norm.vmax) == (0, 1) else None


def over_time(name: str, cells: Sequence[tuple[Run, Statistic]]) -> Picture | None:
    """A heat map for each (run, statistic) that there is: steps on x, heads on y grouped by layer, onsets of its event marked."""
    shown = [
        (run, one, one.panel, *folded(values, least=one.panel.low_is_dark))
        for run, one in cells
        if one.panel and (values := run.by_head(one.name)) is not None
    ]
    if not shown:
        return None
    several = len({run.name for run, *_ in shown}) > 1
    places = [_rows(values) for *_, values, _ in shown]
    deepest = max(len({layer for layer, _ in rows}) for rows in places)
    height = float(np.clip(0.075 * max(map(len, places)), min(0.3 * deepest, TALLEST), TALLEST))
    same = len({tuple((layer["mixer"], layer["num_heads"]) for layer in run.layers) for run, *_ in shown}) == 1
    widest = max((len(layer["mixer"]) for run, *_ in shown for layer in run.layers), default=4)
    left = 0.55 + 0.068 * widest
    columns = min(3, max(len(shown), 1))
    gap = (0.42 if same else left, 0.8)
    figure, axes = panels(len(shown), columns=columns, height=max(height, 0.7), left=left, gap=gap, margin=(0.55, 0.5))
    norms = {one.name: scale(panel, [v for _, other, _, v, _ in shown if other.name == one.name]) for _, one, panel, *_ in shown}
    for position, (ax, (run, one, panel, values, together)) in enumerate(zip(axes, shown)):
        mesh = _heat(ax, run, one, values, together, norms[one.name], labels=position % columns == 0 or not same)
        barred = not several or position in (columns - 1, len(shown) - 1)
        title(ax, run.name if several else panel.title, size=9 if several else 9.5, beside=0.34 if barred else 0)
        if barred:
            colour_bar(ax, mesh, ticks=_ticks(norms[one.name]), width=0.3)
    whose = f"{shown[0][2].title}, one panel for each run. " if several else ""
    parts = [
        f"{whose}Each row is a head, grouped by layer from the first (top) to the last; the strip is coloured by layer kind."
    ]
    if (most := max(together for *_, together in shown)) > 1:
        parts.append(f"Up to {most} neighbouring heads of a layer share a row, which shows the strongest colour among them.")
    parts += [f"{panel.title}: {one.meaning}." for one, panel in {one.name: (one, panel) for _, one, panel, *_ in shown}.values()]
    if any(_onsets(run, one) for run, one, *_ in shown):
        parts.append("Triangles mark the step of a head's event, such as that at which it became a sink.")
    return picture(name, figure, " ".join(parts))


def _onsets(run: Run, statistic: Statistic) -> list[dict[str, Any]]:
    """The events of heads that the statistic's threshold made."""
    kind = None if statistic.event is None else statistic.event.kind
    return [event for event in run.events if event["kind"] == kind and event["head"] is not None]


def _rows(array: np.ndarray) -> list[tuple[int, int]]:
    """The (layer, head) pairs that have a value, in order."""
    return [(layer, head) for layer, head in np.ndindex(array.shape[1:3]) if np.isfinite(array[:, layer, head]).any()]


def folded(array: np.ndarray, *, least: bool = False) -> tuple[np.ndarray, int]:
    """Values `[N, L, H]` with so many neighbouring heads of a layer in one that rows stay visible, and how many those are: of each the
    largest, or the least."""
    steps, layers, heads = array.shape
    together = math.ceil(layers * heads / MOST_ROWS)
    if together == 1:
        return array, 1
    blank = np.inf if least else -np.inf
    padded = np.pad(np.where(np.isfinite(array), array, blank), ((0, 0), (0, 0), (0, -heads % together)), constant_values=blank)
    strongest = (np.min if least else np.max)(padded.reshape(steps, layers, -1, together), axis=-1)
    return np.where(np.isfinite(strongest), strongest, np.nan), together


def _heat(ax: Axes, run: Run, statistic: Statistic, array: np.ndarray, together: int, norm: Normalize, *, labels: bool) -> Any:
    """Draws values `[N, L, H]`, so many heads `together` in each."""
    rows, steps = _rows(array), run.probes.steps.astype(float)
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = (steps[1] - steps[0], steps[-1] - steps[-2]) if steps.size > 1 else (1.0, 1.0)
    edges = np.array([steps[0] - first / 2, *middles, steps[-1] + last / 2])
    matrix = np.array([array[:, layer, head] for layer, head in rows])
    mesh = ax.pcolormesh(edges, np.arange(len(rows) + 1), matrix, cmap=colours(statistic.panel), norm=norm, rasterized=True)
    ax.set_ylim(len(rows), 0)
    starts = [i for i, (layer, _) in enumerate(rows) if i == 0 or rows[i - 1][0] != layer] + [len(rows)]
    inches = ax.get_position().height * ax.figure.get_figheight() / (len(starts) - 1)  # of a layer
    ax.hlines(starts[1:], *edges[[0, -1]], color=PAPER, linewidth=min(1.6, 8 * inches))
    kind_strip(ax, [(start + 0.1, end - 0.1, run.layers[rows[start][0]]["kind"]) for start, end in pairwise(starts)])
    centres = [(start + end) / 2 for start, end in pairwise(starts)]
    names = [f"{rows[start][0]}  {run.layers[rows[start][0]]['mixer']}" for start in starts[:-1]]
    every = max(1, math.ceil(LABEL / inches))
    ax.set_yticks(centres[::every], names[::every] if labels else [])
    ax.tick_params(axis="y", labelsize=8 if every == 1 and inches > 0.16 else 6.5)
    at = {row: index + 0.5 for index, row in enumerate(rows)}
    heads = [(event["step"], event["layer"], event["head"] // together) for event in _onsets(run, statistic)]
    onsets = [(step, at[layer, head]) for step, layer, head in heads if (layer, head) in at]
    size = 5 if len(onsets) <= 100 else 3
    style = {"color": "#ee7733", "markersize": size, "markeredgecolor": PAPER, "markeredgewidth": 0.12 * size}
    ax.plot([step for step, _ in onsets], [row for _, row in onsets], ">", **style)
    step_axis(ax)
    return mesh


def final(runs: Sequence[Run], shown: Sequence[Statistic]) -> Picture | None:
    """Layer x head at the last probe step: one map for each statistic of heads, or for several runs one row for each; then those by
    entry."""
    several = len(runs) > 1
    maps = [_Map(one, one.panel) for one in shown if one.panel and one.per == "head" and (one.panel.compared or not several)]
    maps += [_Map(one.statistic, one.panel, entries=True) for one in maps if one.panel.by_entry]
    maps = [one for one in maps if any(one.of(run) is not None for run in runs)]
    if not maps:
        return None
    norms = [scale(one.panel, [a for run in runs if (a := one.of(run)) is not None]) for one in maps]
    cells = [(run, one, norm) for one, norm in zip(maps, norms) for run in runs]
    columns = len(runs) if several else 4
    height = float(np.clip(0.16 * max(len(run.layers) for run in runs), 0.7, 2.0 if several else 4.0))
    figure, axes = panels(
        len(cells),
        columns=columns,
        height=height,
        left=0.5,
        gap=(0.42, 0.72 if several else 0.85),
        margin=(0.78 if several else 0.62, 0.42),
    )
    for index, (ax, (run, one, norm)) in enumerate(zip(axes, cells)):
        first = index % columns == 0
        matrix = one.of(run)
        if matrix is None:
            blank(ax, "none in this run")
        else:
            image = ax.imshow(matrix, aspect="auto", cmap=colours(one.panel), norm=norm, interpolation="nearest")
            layer_by_head(ax, run, matrix, first=first, label="entry" if one.entries else "head")
            if not several or index % columns == columns - 1:
                colour_bar(ax, image, ticks=_ticks(norm))
        if first or not several:
            title(ax, one.title, size=8.5, beside=0 if several or matrix is None else 0.38)
        if several and index < columns:
            head_of(ax, run.name, run_colour(run.place))
    steps = ", ".join(dict.fromkeys(f"{run.probes.steps[-1]:,}" for run in runs if run.probes.steps.size))
    caption = f"At step {steps}. Rows are layers, columns heads; blank where a layer has no such value. "
    caption += "One column for each run and one colour scale for each row; " if several else ""
    caption += "Definitions says what each value is."
    if any(one.entries for one in maps):
        caption += " By entry: the largest of a layer's heads."
    return picture("final", figure, caption)


@dataclass(frozen=True)
class _Map:
    """One row of the maps at the end."""

    statistic: Statistic
    panel: Panel
    entries: bool = False

    @property
    def title(self) -> str:
        return (self.panel.by_entry or "") if self.entries else self.panel.title

    def of(self, run: Run) -> np.ndarray | None:
        """Layer x head, or layer x entry, of a run's last probe; None where it has no value."""
        last = None
        if not self.entries:
            values = run.by_head(self.statistic.name)
            last = None if values is None else values[-1]
        elif (whole := run.probes.arrays.get(self.statistic.name)) is not None:
            last = np.where(np.isfinite(whole[-1]), whole[-1], -np.inf).max(1)
            last = np.where(last > -np.inf, last, np.nan)
        return last if last is not None and np.isfinite(last).any() else None


def layer_by_head(ax: Axes, run: Run, matrix: np.ndarray, *, first: bool, label: str) -> None:
    """Axes and layer kinds of a picture whose rows are layers and whose columns are heads, or what `label` says."""
    layers, heads = matrix.shape
    ax.set_xticks(range(0, heads, max(1, heads // 4)))
    if label == "entry":
        ax.set_xticks(range(0, heads, max(1, heads // 4)), range(1, heads + 1, max(1, heads // 4)))
    ax.set_yticks(range(0, layers, max(1, layers // 8)))
    ax.tick_params(labelsize=7, length=0)
    ax.set_xlabel(label, fontsize=7.5, labelpad=1)
    if first:
        ax.set_ylabel("layer", fontsize=7.5)
    kind_strip(ax, [(index - 0.4, index + 0.4, layer["kind"]) for index, layer in enumerate(run.layers[:layers])])
    ax.set_facecolor("#f4f6f8")
