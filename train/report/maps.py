"""Heat maps of every head: over training steps, and at the end as layer x head."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm, Normalize

from plait.train.report.run import Run
from plait.train.report.style import (
    AMOUNT_MAP,
    ENTROPY_MAP,
    PAPER,
    Picture,
    blank,
    colour_bar,
    kind_strip,
    panels,
    picture,
    run_colour,
    step_axis,
)


@dataclass(frozen=True)
class HeadValue:
    """A probe with one value a head: key, title, what it means, its fixed range if any, logarithmic or not."""

    key: str
    title: str
    meaning: str
    limits: tuple[float, float] | None = None
    log: bool = False
    low_is_dark: bool = False
    compared: bool = True
    """Whether a comparison of several runs shows it."""

    @property
    def colours(self) -> Colormap:
        """Entropy has a colour map of its own; for every other value dark is what one looks for."""
        if self.key == "entropy_ratio":
            return ENTROPY_MAP
        return AMOUNT_MAP.reversed() if self.low_is_dark else AMOUNT_MAP


ENTROPY = HeadValue(
    "entropy_ratio",
    "Entropy / log n",
    "Entropy of the attention row divided by the log of the number of visible keys, mean over queries: 1 looks everywhere alike, "
    "0 at one token.",
    (0, 1),
)
SINK = HeadValue(
    "sink",
    "Sink weight α₁",
    "Mean weight that the queries give the first token of their document; a sink above 0.3.",
    limits=(0, 1),
)
HORIZON = HeadValue("decay_horizon", "Decay horizon", "Tokens after which a linear head's state is down to 1/e.", log=True)
WRITE = HeadValue("write_strength", "Write strength", "Mean Frobenius norm of a token's write to the state of a linear head.")
LOAD = HeadValue("head_load", "Head load", "Share of tokens that choose the head (mixture of heads).", limits=(0, 1))
HEAD_VALUES = (
    ENTROPY,
    SINK,
    HeadValue(
        "sink_rate", "Sink rate", "Share of held-out sequences in which the head has α₁ > 0.3.", limits=(0, 1), compared=False
    ),
    HeadValue("max_logit", "Largest logit", "Largest attention logit before the softmax; linear layers have none."),
    HeadValue(
        "value_drain", "Value drain", "‖v₀‖ / mean ‖vⱼ‖: a sink that carries no content is well below 1.", low_is_dark=True
    ),
    HORIZON,
    WRITE,
    HeadValue("state_norm", "State norm", "Frobenius norm of the recurrent state at the end of a sequence.", compared=False),
    LOAD,
)


def _norm(value: HeadValue, arrays: Sequence[np.ndarray]) -> Normalize:
    """One colour scale for every panel that shows this value."""
    finite = np.concatenate([array[np.isfinite(array)].ravel() for array in arrays])
    if value.limits or not finite.size:
        return Normalize(*(value.limits or (0, 1)))
    if value.log and (finite > 0).any():
        low, high = finite[finite > 0].min(), finite.max()
        return LogNorm(low, high if high > low else 2 * low)
    low, high = min(0.0, float(finite.min())), float(finite.max())
    return Normalize(low, high if high > low else low + 1)


def _ticks(norm: Normalize) -> list[float] | None:
    if isinstance(norm, LogNorm):
        decades = 10.0 ** np.arange(np.ceil(np.log10(norm.vmin) - 1e-6), np.floor(np.log10(norm.vmax) + 1e-6) + 1)
        return list(decades[:: max(1, len(decades) // 4)])
    return [0, 0.5, 1] if (norm.vmin, norm.vmax) == (0, 1) else None


def over_time(name: str, cells: Sequence[tuple[int, Run, HeadValue]], missing: str) -> Picture | str:
    """One heat map for each (run, value): steps on x, heads on y grouped by layer; onsets of sinks are marked on sink maps."""
    shown = [(index, run, value, array) for index, run, value in cells if (array := run.probe(value.key)) is not None]
    if not shown:
        return missing
    several = len({index for index, *_ in cells}) > 1
    places = [_rows(array) for *_, array in shown]
    height = float(np.clip(0.075 * max(map(len, places)), 0.3 * max(len({layer for layer, _ in rows}) for rows in places), 12.0))
    same = len({tuple((layer["mixer"], layer["num_heads"]) for layer in run.layers) for _, run, *_ in shown}) == 1
    widest = max((len(layer["mixer"]) for _, run, *_ in shown for layer in run.layers), default=4)
    left = 0.55 + 0.068 * widest
    columns = min(3, max(len(shown), 1))
    gap = (0.42 if same else left, 0.8)
    figure, axes = panels(len(shown), columns=columns, height=max(height, 0.7), left=left, gap=gap, margin=(0.5, 0.5))
    norms = {value.key: _norm(value, [array for *_, other, array in shown if other is value]) for *_, value, _ in shown}
    for position, (ax, (_, run, value, array)) in enumerate(zip(axes, shown)):
        mesh = _heat(ax, run, array, value, norms[value.key], labels=position % columns == 0 or not same)
        ax.set_title(run.name if several else value.title, fontsize=9 if several else 9.5)
        if not several or position in (columns - 1, len(shown) - 1):
            colour_bar(ax, mesh, ticks=_ticks(norms[value.key]), width=0.3)
    title = f"{shown[0][2].title}, one panel for each run. " if several else ""
    parts = [
        f"{title}Each row is a head, grouped by layer from the first (top) to the last; the strip is coloured by layer kind."
    ]
    parts += [f"{value.title}: {value.meaning}" for value in dict.fromkeys(value for *_, value, _ in shown)]
    if any(event["kind"] == "sink_onset" for _, run, *_ in shown for event in run.events) and SINK in [cell[2] for cell in shown]:
        parts.append("Triangles mark the step at which a head became a sink.")
    return picture(name, figure, " ".join(parts))


def _rows(array: np.ndarray) -> list[tuple[int, int]]:
    """The (layer, head) pairs that have a value, in order."""
    return [(layer, head) for layer, head in np.ndindex(array.shape[1:3]) if np.isfinite(array[:, layer, head]).any()]


def _heat(ax: Axes, run: Run, array: np.ndarray, value: HeadValue, norm: Normalize, *, labels: bool) -> Any:
    rows, steps = _rows(array), run.probes.steps.astype(float)
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = (steps[1] - steps[0], steps[-1] - steps[-2]) if steps.size > 1 else (1.0, 1.0)
    edges = np.array([steps[0] - first / 2, *middles, steps[-1] + last / 2])
    matrix = np.array([array[:, layer, head] for layer, head in rows])
    mesh = ax.pcolormesh(edges, np.arange(len(rows) + 1), matrix, cmap=value.colours, norm=norm, rasterized=True)
    ax.set_ylim(len(rows), 0)
    starts = [i for i, (layer, _) in enumerate(rows) if i == 0 or rows[i - 1][0] != layer] + [len(rows)]
    ax.hlines(starts[1:], *edges[[0, -1]], color=PAPER, linewidth=1.6)
    kind_strip(ax, [(start + 0.1, end - 0.1, run.layers[rows[start][0]]["kind"]) for start, end in pairwise(starts)])
    centres = [(start + end) / 2 for start, end in pairwise(starts)]
    names = [f"{rows[start][0]}  {run.layers[rows[start][0]]['mixer']}" for start in starts[:-1]]
    ax.set_yticks(centres, names if labels else [])
    ax.tick_params(axis="y", labelsize=8 if len(names) <= 24 else 6.5)
    if value is SINK:
        for event in run.events:
            if event["kind"] == "sink_onset" and (event["layer"], event["head"]) in rows:
                y = rows.index((event["layer"], event["head"])) + 0.5
                ax.plot(event["step"], y, ">", color="#ee7733", markersize=5, markeredgecolor=PAPER, markeredgewidth=0.6)
    step_axis(ax)
    return mesh


def final(runs: Sequence[tuple[int, Run]]) -> Picture | str:
    """Layer x head at the last probe step: one panel for each value, or for several runs one row for each value."""
    several = len(runs) > 1
    values: list[HeadValue | None] = [
        value
        for value in HEAD_VALUES
        if any(run.probe(value.key) is not None for _, run in runs) and (value.compared or not several)
    ]
    if not values:
        return "No probe of any head was written."
    norms = {value: _norm(value, [a[-1] for _, run in runs if (a := run.probe(value.key)) is not None]) for value in values}
    if any(_profile(run) is not None for _, run in runs):
        values.append(None)  # stands for alpha_k by position
    cells = [(run, value) for value in values for _, run in runs]
    columns = len(runs) if several else 5
    height = float(np.clip((0.11 if several else 0.16) * max(len(run.layers) for _, run in runs), 0.7, 4.0))
    figure, axes = panels(
        len(cells), columns=columns, height=height, left=0.5, gap=(0.42, 0.62 if several else 0.78), margin=(0.55, 0.42)
    )
    for index, (ax, (run, value)) in enumerate(zip(axes, cells)):
        first = index % columns == 0
        array = _profile(run) if value is None else run.probe(value.key)
        matrix = array if value is None or array is None else array[-1]
        if matrix is None or not np.isfinite(matrix).any():
            blank(ax, "none in this run")
        else:
            norm = norms.get(value, Normalize(0, 1))
            image = ax.imshow(
                matrix, aspect="auto", cmap=value.colours if value else AMOUNT_MAP, norm=norm, interpolation="nearest"
            )
            _cells(ax, run, matrix, first=first, label="head" if value else "position in the document")
            if value and (not several or index % columns == columns - 1):
                colour_bar(ax, image, ticks=_ticks(norm))
        if first or not several:
            ax.set_title(value.title if value else "αₖ by position k", fontsize=8.5)
        if several and index < columns:
            inch = 1 / (ax.get_position().height * figure.get_figheight())
            ax.text(0, 1 + 0.32 * inch, run.name, transform=ax.transAxes, color=run_colour(index), weight="bold", fontsize=9.5)
    steps = ", ".join(dict.fromkeys(f"{run.probes.steps[-1]:,}" for _, run in runs if run.probes.steps.size))
    caption = f"At step {steps}. Rows are layers, columns heads; blank where a layer has no such value. "
    if several:
        caption += "One column for each run and one colour scale for each row; Definitions says what each value is."
    else:
        caption += " ".join(f"{value.title}: {value.meaning}" for value in values[2:] if value)
    if None in values:
        caption += " αₖ by position: the largest αₖ of a head for each layer, so a sink on another token than the first is seen."
    return picture("final", figure, caption)


def _profile(run: Run) -> np.ndarray | None:
    """The largest alpha_k over heads at the last probe, [L, K]."""
    if run.probe("sink") is None:
        return None
    last = run.probes.arrays["sink"][-1]
    return np.where(np.isfinite(last), last, -np.inf).max(1) if np.isfinite(last).any((1, 2)).all() else None


def _cells(ax: Axes, run: Run, matrix: np.ndarray, *, first: bool, label: str) -> None:
    layers, heads = matrix.shape
    ax.set_xticks(range(0, heads, max(1, heads // 4)))
    if label != "head":
        ax.set_xticks(range(0, heads, max(1, heads // 4)), range(1, heads + 1, max(1, heads // 4)))
    ax.set_yticks(range(0, layers, max(1, layers // 8)))
    ax.tick_params(labelsize=7, length=0)
    ax.set_xlabel(label, fontsize=7.5, labelpad=1)
    if first:
        ax.set_ylabel("layer", fontsize=7.5)
    kind_strip(ax, [(index - 0.4, index + 0.4, layer["kind"]) for index, layer in enumerate(run.layers[:layers])])
    ax.set_facecolor("#f4f6f8")
