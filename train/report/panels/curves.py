"""Curves over training steps: loss, speed, what else was logged, and the events on the same axis."""

import functools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from plait.train.probes.collect import ATTENTION, kind_name
from plait.train.report.panels import seeds
from plait.train.report.run import Run
from plait.train.report.style import (
    INK,
    KIND_DASHES,
    MUTED,
    Picture,
    kind_colour,
    panels,
    picture,
    run_colour,
    run_dash,
    short,
    step_axis,
    title,
    value_axis,
)
from plait.train.report.variants import variants

CROSSES = 200  # at most, of losses that are not finite


def smooth(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """An exponential mean over about `share` of the points, and over no more than a tenth of those so far; NaN where a point is not finite,
    without a part in the mean.

    The second bound keeps the line from lagging behind the steep start of a loss.
    """
    mean = weight = 0.0
    smoothed = np.full(len(values), np.nan)
    for index, value in enumerate(values):
        decay = 1 - 1 / max(1.0, min(share * len(values), 0.1 * (index + 1)))
        if math.isfinite(value):
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
            smoothed[index] = mean / weight
    return smoothed


def thin(steps: np.ndarray, values: np.ndarray, most: int = 2000, *, log: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """At most so many of the points, in order: the lowest and the highest of each even part of the (logarithmic) axis of steps."""
    if len(values) <= most:
        return steps, values
    places = np.log(np.maximum(steps, 1)) if log else steps.astype(float)
    part = ((places - places[0]) / max(places[-1] - places[0], 1e-9) * (most // 2 - 1)).astype(int)
    finite = np.isfinite(values)
    low, high = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
    kept = set()
    for points in np.split(np.arange(len(values)), np.flatnonzero(np.diff(part)) + 1):
        kept |= {int(points[np.argmin(low[points])]), int(points[np.argmax(high[points])])}
    at = np.array(sorted(kept))
    return steps[at], values[at]


def loss(runs: Sequence[Run]) -> Picture | str:
    """Training and validation loss: the whole run on a logarithmic step axis, and its second half enlarged."""
    if not any(run.series(name)[0].size for run in runs for name in ("loss/train", "loss/val")):
        return "No loss was logged."
    end = max((run.records[-1]["step"] for run in runs if run.records), default=1)
    whole, half = (1 if end > 1 else 0), end / 2  # a logarithmic axis has no step 0
    figure, axes = panels(2, columns=2, height=3.3, gap=(0.75, 0), margin=(0.36, 0.5))
    seen = [level for run in runs for level in _loss_of(axes[1], run, half, alone=len(runs) == 1)]
    for run in runs:
        _loss_of(axes[0], run, whole, alone=len(runs) == 1)
    for ax, start in zip(axes, (whole, half), strict=True):
        _smooth_losses(ax, runs, start)
    axes[0].set(title="Whole run", ylabel="nats per token", xlabel="step, logarithmic")
    axes[1].set(title="Second half, enlarged", ylabel="nats per token")
    if end > 1:
        axes[0].set_xscale("log")
        axes[0].xaxis.set_major_formatter(FuncFormatter(short))
        axes[0].xaxis.set_minor_formatter(NullFormatter())
    step_axis(axes[1])
    if seen:
        room = 0.12 * (max(seen) - min(seen)) or 0.1
        axes[1].set(xlim=(half, end * 1.01), ylim=(min(seen) - room, max(seen) + room))
    for ax in axes:
        value_axis(ax)
    validation = [Line2D([], [], color=INK, marker="o", markerfacecolor="white", linewidth=0.8)]
    validated = any(run.series("loss/val")[0].size for run in runs)
    seeds.legend(axes[0], runs, validation if validated else [], ["validation"] if validated else [])
    caption = "Faint: every logged training loss. Solid: its exponential mean over 2% of the points. Circles: validation loss."
    if any(event["kind"] == "loss_spike" for run in runs for event in run.events):
        caption += " Triangles on the upper edge mark loss spikes."
    if any(not np.isfinite(run.series("loss/train")[1]).all() for run in runs):
        caption += " Where a training loss is not finite, the line has a gap, and a cross is on the upper edge."
    return picture("loss", figure, caption)


def by_position(runs: Sequence[Run]) -> Picture | None:
    """Validation loss by position in the document: of a single run at up to five validations, of several at their last; None where
    there is none."""
    lines = [(index, line) for index, run in enumerate(runs) for line in _by_position(run, most=5 if len(runs) == 1 else 1)]
    if not lines:
        return None
    figure, (ax,) = panels(1, columns=1, height=3.0, margin=(0.36, 0.5))
    for order, (index, (step, losses)) in enumerate(lines):
        last = len(runs) > 1 or order == len(lines) - 1
        place = runs[index].place
        style = {
            "color": run_colour(place) if last else MUTED,
            "linestyle": run_dash(place),
            "linewidth": 0.9 if not last or runs[index].repeats > 1 else 1.8,
        }
        ax.plot(
            [first + 1 for first in losses],
            list(losses.values()),
            label=f"step {step:,}",
            alpha=1 if last else 0.5 + 0.4 * order / len(lines),
            **style,
        )
    ax.set(
        title="Loss by position", ylabel="nats per token", xlabel="position in the document, from 1, logarithmic", xscale="log"
    )
    ax.xaxis.set_major_formatter(FuncFormatter(short))
    ax.xaxis.set_minor_formatter(NullFormatter())
    value_axis(ax)
    if len(runs) > 1:
        seeds.legend(ax, runs)
    else:
        ax.legend(*(part[:12] for part in ax.get_legend_handles_labels()), loc="best", handlelength=1.8)
    return picture("positions", figure, "Validation loss over doubling ranges of positions, drawn at the first of each.")


def _by_position(run: Run, *, most: int) -> list[tuple[int, dict[int, float]]]:
    """Step and losses by the first position of each range, of the last validation and evenly of those before."""
    found = []
    for record in run.records:
        places = {name.removeprefix(POSITIONS): value for name, value in record.items() if name.startswith(POSITIONS)}
        losses = {int(first): value for first, value in places.items() if first.isdecimal()}
        if len(losses) > 1:
            found.append((int(record["step"]), dict(sorted(losses.items()))))
    picked = np.linspace(len(found) - 1, 0, min(most, len(found))).round().astype(int)
    return [found[i] for i in picked[::-1]]


def _loss_of(ax: Axes, run: Run, start: float, *, alone: bool) -> list[float]:
    """Draws the losses of one run as logged from a step on, its validation and its spikes; the finite levels of its smooth line and its
    validation."""
    colour, dash, levels = run_colour(run.place), run_dash(run.place), []
    (steps, values), (val_steps, val) = run.series("loss/train"), run.series("loss/val")
    smoothed, late, val_late = smooth(values), steps >= start, val_steps >= start
    if late.sum() > 8:
        faint = {"linewidth": 0.6, "alpha": 0.25 if alone else 0.1}
        if run.repeats == 1:
            ax.plot(*thin(steps[late], values[late], log=start <= 1), color=colour, **faint)
    if late.any():
        levels += list(smoothed[late])
    if val_late.any() and run.repeats == 1:
        style = {"marker": "o", "markersize": 4.2, "markerfacecolor": "white", "markeredgewidth": 1.2}
        ax.plot(val_steps[val_late], val[val_late], color=INK if alone else colour, linewidth=0.8, linestyle=dash, **style)
    levels += list(val[val_late])
    spikes = [event["step"] for event in run.events if event["kind"] == "loss_spike" and event["step"] >= start]
    place = {"transform": ax.get_xaxis_transform(), "clip_on": False, "linestyle": "", "markeredgewidth": 0}
    ax.plot(spikes, [0.99] * len(spikes), marker="v", color=INK if alone else colour, markersize=5.5, **place)
    broken = steps[late & ~np.isfinite(values)]
    broken = broken[np.linspace(0, len(broken) - 1, min(len(broken), CROSSES)).astype(int)]
    ax.plot(
        broken,
        [1.015] * len(broken),
        marker="x",
        color=INK if alone else colour,
        markersize=5,
        **place | {"markeredgewidth": 1.2},
    )
    return [level for level in levels if math.isfinite(level)]


def _smooth_losses(ax: Axes, runs: Sequence[Run], start: float) -> None:
    """Draws the smooth training losses of the runs from a step on, and the mean validation of variants of several seeds."""
    lines = {}
    for index, run in enumerate(runs):
        steps, values = run.series("loss/train")
        if (late := steps >= start).any():
            lines[index] = steps[late], smooth(values)[late]
    seeds.draw(ax, runs, lines, functools.partial(thin, log=start <= 1), markersize=4)
    for place, one in enumerate(variants(runs)):
        held = [run.series("loss/val") for run in one.runs] if len(one.runs) > 1 else []
        if held := [line for line in held if line[0].size]:
            steps, values = seeds.mean(held)
            style = {"marker": "o", "markersize": 4.2, "markerfacecolor": "white", "markeredgewidth": 1.2}
            ax.plot(steps[steps >= start], values[steps >= start], color=run_colour(place), linewidth=0.8, **style)


SCALARS = {
    "throughput/tokens_per_second": ("Speed", "tokens per second"),
    "throughput/mfu": ("Model FLOP utilisation", "share of peak"),
    "time/step": ("Time of one step", "seconds"),
    "time/data": ("Waiting for the batch, a step", "seconds"),
    "time/data_max": ("The same on the host that waited most", "seconds"),
    "time/host_max": ("Slowest host's own time, a step", "seconds"),
    "time/host_mean": ("Mean host's own time, a step", "seconds"),
    "time/slowest_host": ("Slowest host", "number"),
    "loss/in_context": ("In-context score", "nats, token 500 less token 50"),
    "predictions/repetition": ("Repetition of predicted tokens", "share that the next one repeats"),
    "grad/norm": ("Gradient norm, before clipping", "L2 norm"),
    "optimizer/learning_rate": ("Learning rate", "per step"),
}
OFTEN = ("loss/train", "loss/val", "loss/bits_per_byte")  # shown elsewhere
POSITIONS = "position/"  # begins the names of losses by position, shown elsewhere too


def scalars(runs: Sequence[Run]) -> Picture | str:
    """Speed, optimisation and whatever else the run logged that no probe draws, one small panel for each name."""
    logged = dict.fromkeys(name for run in runs for record in run.records for name in record if "/" in name)
    told = [one for run in runs for one in run.statistics.values() if one.name in run.probes.arrays]
    drawn = {
        one.metric.name for one in told if one.metric and one.panel and (one.panel.lines or one.panel.map or one.panel.trends)
    }
    kinds = {layer["kind"] for run in runs for layer in run.layers}
    drawn |= {kind_name(name, kind) for name in drawn if name.startswith(ATTENTION) for kind in kinds}  # panels tell kinds apart
    names = [name for name in SCALARS if name in logged] + sorted(
        name for name in logged if name not in (*SCALARS, *OFTEN, *drawn) and not name.startswith(POSITIONS)
    )
    told_apart = {name: of for name in names if (of := _by_kind(name, names, sorted(kinds)))}
    within = {one for of in told_apart.values() for one in of.values() if len(of) == 1 or len(runs) == 1}
    names = [name for name in names if name not in within]
    if not names:
        return "Besides the loss nothing was logged: no speed, no gradient norm."
    shown = names[:24]
    figure, axes = panels(len(shown), columns=min(4, max(2, len(shown))), height=1.65, gap=(0.72, 0.78), margin=(0.4, 0.48))
    for ax, name in zip(axes, shown):
        words, unit = SCALARS.get(name, (name, ""))
        found = {index: line for index, run in enumerate(runs) if (line := run.series(name))[0].size}
        for index, (steps, values) in found.items():
            if steps.size > 1 and runs[index].repeats == 1:
                ax.plot(*thin(steps, values), color=run_colour(runs[index].place), linewidth=0.5, alpha=0.25)
        seeds.draw(ax, runs, {index: (steps, smooth(values)) for index, (steps, values) in found.items()}, thin)
        if len(runs) == 1 and len(of := told_apart.get(name, {})) > 1:
            for kind, one in of.items():
                steps, values = runs[0].series(one)
                ax.plot(
                    *thin(steps, smooth(values)),
                    color=kind_colour(kind),
                    linestyle=KIND_DASHES.get(kind, "-"),
                    linewidth=1.3,
                    label=kind,
                )
            ax.lines[-len(of) - 1].set_label("all")
            ax.legend(fontsize=6.5, loc="best", handlelength=1.4)
        title(ax, words, size=8.5)
        ax.set_ylabel(unit, fontsize=7.5)
        lines = [line.get_ydata() for line in ax.lines]
        values = np.concatenate([np.asarray(line, float) for line in lines]) if lines else np.array([])
        values = values[np.isfinite(values)]
        value_axis(ax, log=name == "grad/norm" and values.size > 0 and values.min() > 0)
        if name.startswith(("throughput/", "time/")) and values.size:
            ax.set_ylim(0, 1.15 * np.percentile(values, 98))  # the first step holds the compile time
        step_axis(ax)
    more = f" {len(names) - len(shown)} more names are in metrics.jsonl." if len(names) > len(shown) else ""
    return picture("scalars", figure, "Faint: as logged. Solid: exponential mean over 2% of the points." + more)


def _by_kind(name: str, names: Sequence[str], kinds: Sequence[str]) -> dict[str, str]:
    """By kind of layer, the names of a metric of attention for the layers of each that has it; the metric of one kind alone is the same."""
    return {kind: one for kind in kinds if name.startswith(ATTENTION) and (one := kind_name(name, kind)) in names}


def event_title(kind: str) -> str:
    """A kind of event in words."""
    return kind.replace("_", " ")


def timeline(runs: Sequence[Run]) -> Picture | str:
    """Every event at its step, one lane for each kind, coloured by layer kind or, for several runs, by run."""
    lanes = sorted({event["kind"] for run in runs for event in run.events})
    if not lanes:
        return "No event was recorded: nothing that is watched left its bounds."
    figure, (ax,) = panels(1, columns=1, height=0.4 * len(lanes) + 0.05, left=1.55, margin=(0.3, 0.5))
    marks: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for run in runs:
        for event in run.events:
            layer = event.get("layer")
            known = layer is not None and layer < len(run.layers)
            kind = run.layers[layer]["kind"] if known else "model"
            colour = run_colour(run.place) if len(runs) > 1 else kind_colour(kind) if known else INK
            depth = 0.7 * (layer / max(1, len(run.layers) - 1) - 0.5) if known else 0.0
            place = event["step"], lanes.index(event["kind"]) + depth
            marks.setdefault((colour, "D" if layer is None else "o"), []).append(place)
    size = 6.5 if sum(map(len, marks.values())) <= 200 else 4
    for (colour, marker), places in marks.items():
        style = {"marker": marker, "markersize": size, "markeredgecolor": "white", "markeredgewidth": 0.1 * size}
        ax.plot(*zip(*places), color=colour, linestyle="", **style)
    end = max((run.records[-1]["step"] for run in runs if run.records), default=1)
    ax.set(ylim=(len(lanes) - 0.5, -0.5), xlim=(-0.01 * end, 1.01 * end))
    ax.set_yticks(range(len(lanes)), [event_title(lane) for lane in lanes])
    ax.spines["left"].set_visible(False)
    ax.grid(axis="y")
    step_axis(ax)
    whose = "one colour for each run" if len(runs) > 1 else "coloured by layer kind as in the strip at the top"
    return picture(
        "events",
        figure,
        f"Circles concern one head or layer, {whose}, first layers higher in the lane; diamonds the whole model.",
    )
