"""Heat maps of every head: over training steps, and at the end as layer x head."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.patches import Rectangle

from plait.train.report.run import Run
from plait.train.report.style import (
    AMOUNT_MAP,
    ENTROPY_MAP,
    MUTED,
    PAPER,
    Picture,
    blank,
    colour_bar,
    kind_colour,
    panels,
    picture,
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

    @property
    def colours(self) -> Colormap:
        """Entropy has a colour map of its own; for every other value pale is little and dark is much."""
        return ENTROPY_MAP if self.key == "entropy_ratio" else AMOUNT_MAP


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
LOAD = HeadValue("head_load", "Head load", "Share of tokens that choose the head (mixture of heads).", limits=(0, 1))
HEAD_VALUES = (
    ENTROPY,
    SINK,
    HeadValue("sink_rate", "Sink rate", "Share of held-out sequences in which the head has α₁ > 0.3.", limits=(0, 1)),
    HeadValue("max_logit", "Largest logit", "Largest attention logit before the softmax; linear layers have none."),
    HeadValue("value_drain", "Value drain", "‖v₀‖ / mean ‖vⱼ‖: a sink that carries no content is well below 1."),
    HeadValue("decay_horizon", "Decay horizon", "Tokens after which the state of a linear head has decayed to 1/e.", log=True),
    HeadValue("write_strength", "Write strength", "Mean of the write gate (β) of a linear head."),
    HeadValue("state_norm", "State norm", "Frobenius norm of the recurrent state at the end of a sequence."),
    LOAD,
)


def _norm(value: HeadValue, arrays: Sequence[np.ndarray]) -> Normalize:
    """One colour scale for every panel that shows this value."""
    if value.limits:
        return Normalize(*value.limits)
    finite = np.concatenate([array[np.isfinite(array)].ravel() for array in arrays])
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
    several = len({index for index, *_ in shown}) > 1
    rows = max(len(_rows(run, array)) for _, run, _, array in shown)
    height = float(np.clip(0.075 * rows, 0.35 * max(len(run.layers) for _, run, *_ in shown), 12.0))
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
        if position < columns:
            colour_bar(ax, mesh, ticks=_ticks(norms[value.key]), width=0.3)
    title = f"{shown[0][2].title}, one panel for each run. " if several else ""
    parts = [
        title
        + "Each row is a head, heads grouped by layer from the first (top) to the last; the strip is coloured by layer kind."
    ]
    parts += [f"{value.title}: {value.meaning}" for value in dict.fromkeys(value for *_, value, _ in shown)]
    if any(event["kind"] == "sink_onset" for _, run, *_ in shown for event in run.events) and SINK in [cell[2] for cell in shown]:
        parts.append("Triangles mark the step at which a head became a sink.")
    return picture(name, figure, " ".join(parts))


def _rows(run: Run, array: np.ndarray) -> list[tuple[int, int]]:
    """The (layer, head) pairs that have a value, in order."""
    return [(layer, head) for layer, head in np.ndindex(array.shape[1:3]) if np.isfinite(array[:, layer, head]).any()]


def _heat(ax: Axes, run: Run, array: np.ndarray, value: HeadValue, norm: Normalize, *, labels: bool) -> Any:
    rows, steps = _rows(run, array), run.probes.steps.astype(float)
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = (steps[1] - steps[0], steps[-1] - steps[-2]) if steps.size > 1 else (1.0, 1.0)
    edges = np.array([steps[0] - first / 2, *middles, steps[-1] + last / 2])
    matrix = np.array([array[:, layer, head] for layer, head in rows])
    mesh = ax.pcolormesh(edges, np.arange(len(rows) + 1), matrix, cmap=value.colours, norm=norm, rasterized=True)
    ax.set_ylim(len(rows), 0)
    starts = [i for i, (layer, _) in enumerate(rows) if i == 0 or rows[i - 1][0] != layer] + [len(rows)]
    for start, end in pairwise(starts):
        layer = run.layers[rows[start][0]]
        ax.axhline(end, color=PAPER, linewidth=1.6)
        place = {"transform": ax.get_yaxis_transform(), "clip_on": False, "linewidth": 0}
        ax.add_patch(Rectangle((-0.02, start + 0.1), 0.012, end - start - 0.2, color=kind_colour(layer["kind"]), **place))
    centres = [(start + end) / 2 for start, end in pairwise(starts)]
    names = [f"{rows[start][0]}  {run.layers[rows[start][0]]['mixer']}" for start in starts[:-1]]
    ax.set_yticks(centres, names if labels else [])
    ax.tick_params(axis="y", pad=9, labelsize=8 if len(names) <= 24 else 6.5)
    if value is SINK:
        for event in run.events:
            if event["kind"] == "sink_onset" and (event["layer"], event["head"]) in rows:
                y = rows.index((event["layer"], event["head"])) + 0.5
                ax.plot(event["step"], y, ">", color="#0077bb", markersize=4.5, markeredgecolor=PAPER, markeredgewidth=0.6)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    step_axis(ax)
    return mesh


def final(runs: Sequence[tuple[int, Run]]) -> Picture | str:
    """Layer x head at the last probe step: one panel for each value, or for several runs one row for each value."""
    values = [value for value in HEAD_VALUES if any(run.probe(value.key) is not None for _, run in runs)]
    if not values:
        return "No probe of any head was written."
    several = len(runs) > 1
    profile = any(_profile(run) is not None for _, run in runs)
    rows: list[HeadValue | None] = [*values, *([None] if profile else [])]
    cells = [(run, value) for value in rows for _, run in runs]
    columns = len(runs) if several else 5
    layers = max(len(run.layers) for _, run in runs)
    height = float(np.clip(0.16 * layers, 0.7, 4.0))
    figure, axes = panels(len(cells), columns=columns, height=height, left=0.5, gap=(0.42, 0.78), margin=(0.5, 0.42))
    norms = {value.key: _norm(value, [a[-1] for _, run in runs if (a := run.probe(value.key)) is not None]) for value in values}
    for index, (ax, (run, value)) in enumerate(zip(axes, cells)):
        array = _profile(run) if value is None else run.probe(value.key)
        if array is None or not np.isfinite(array if value is None else array[-1]).any():
            blank(ax, "not measured")
            continue
        matrix, norm = (array, Normalize(0, 1)) if value is None else (array[-1], norms[value.key])
        image = ax.imshow(matrix, aspect="auto", cmap=value.colours if value else AMOUNT_MAP, norm=norm, interpolation="nearest")
        title = value.title if value else "αₖ by position k"
        ax.set_title(f"{title}\n{run.name}" if several and index < columns else title, fontsize=8.5)
        _cells(ax, run, matrix, first=index % columns == 0, label="head" if value else "position in the document")
        if value:
            colour_bar(ax, image, ticks=_ticks(norm), width=0.34)
    steps = ", ".join(dict.fromkeys(f"{run.probes.steps[-1]:,}" for _, run in runs if run.probes.steps.size))
    caption = f"At step {steps}. Rows are layers, columns heads; white where a layer has no such value. "
    caption += " ".join(f"{value.title}: {value.meaning}" for value in values[2:])
    if profile:
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
    ax.tick_params(axis="y", pad=6)
    ax.set_xlabel(label, fontsize=7.5, labelpad=1)
    if first:
        ax.set_ylabel("layer", fontsize=7.5)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    for index, layer in enumerate(run.layers[:layers]):
        place = {"transform": ax.get_yaxis_transform(), "clip_on": False, "linewidth": 0}
        ax.add_patch(Rectangle((-0.035, index - 0.4), 0.02, 0.8, color=kind_colour(layer["kind"]), **place))
    ax.set_facecolor("#f4f6f8")
    ax.spines["left"].set_color(MUTED)
