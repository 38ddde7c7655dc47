"""The page of a sweep: its metric by the keys that vary, differences from a baseline, and the curves of all runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from plait.train.report import check_page, write_page
from plait.train.report.page import Markup, Section, lead, table
from plait.train.report.panels.costs import names_of, of_costs
from plait.train.report.panels.curves import smooth, thin
from plait.train.report.style import RC, WIDTH, Picture, panels, picture, run_colour, run_dash, short, step_axis, value_axis
from plait.train.report.winner import best_first, hint, opening
from plait.train.sweep import fronts
from plait.train.sweep.arms import LEVEL, RATE, Arm, Estimate, arms, baselines, difference, sensitivities
from plait.train.sweep.better import Better
from plait.train.sweep.better import better as better_of
from plait.train.sweep.growth import Growth
from plait.train.sweep.record import Sweep, read
from plait.train.sweep.workers import claims

PROBED = {
    "attn/sink_rate": ("Sink rate", "share of documents"),
    "attn/entropy_ratio": ("Entropy / log n", "share"),
}
MOST_NAMED = 12


def write_sweep(
    folder: Path,
    out: Path | None = None,
    *,
    by: Sequence[str] = (),
    metric: str = "loss/val",
    baseline: str | None = None,
    better: Better | None = None,
) -> Path:
    """The path of the new page about the sweep in `folder`, in its `report/` by default.

    Args:
      folder: holds `sweep.json`.
      out: folder of the page.
      by: keys of the axis and of the colour.
      metric: of the end of each run.
      baseline: KEY=VALUE of the arms that others are compared with.
      better: whether less of the metric is better, or more; by its name if None.
    Raises:
      ValueError: a key, the metric or the baseline is unknown, no run is over, or `out` holds files that are of no report.
    """
    sweep = read(folder)
    out = folder / "report" if out is None else out
    check_page(out)
    found = arms(folder, sweep, by, metric, () if baseline is None else (baseline.partition("=")[0],))
    with matplotlib.rc_context(RC):
        sections = list(_sections(folder, sweep, found, metric, baseline, better or better_of(metric), bool(by)))
    name = folder.resolve().name
    over = sum(claims.status(folder, run) in claims.OVER for run in sweep.runs)
    told = f"{over} of {len(sweep.runs)} runs are over; {len(found)} arms; {metric}"
    head = f"<small>plait sweep report</small><h1>{escape(name)}</h1>{lead(told)}"
    return write_page(out, f"plait sweep: {name}", head, sections, "from the folder of the sweep alone")


def _sections(
    folder: Path, sweep: Sweep, found: list[Arm], metric: str, baseline: str | None, better: Better, asked: bool
) -> Iterator[Section]:
    results = Markup(_table(folder, found, metric, baseline, better))
    first = Markup(opening(folder, sweep, found, metric, better))
    yield Section("Results", f"{metric} at the end", [*([first] if first else []), _by_key(found, metric, asked), results])
    if (picture := of_costs(found, metric, better)) is not None:
        yield Section("Cost", f"{metric} by what it costs", [picture])
    if RATE in found[0].keys and metric.startswith("loss/"):
        yield Section("Sensitivity", "Learning-rate sensitivity", [Markup(_sensitivity(folder, found))])
    yield Section(
        "Loss", "Loss of all runs", [_curves(folder, found, {"loss/train": ("Training loss", "nats per token")}, "loss")]
    )
    if any(claims.logged(folder, run, name) for arm in found for run in arm.runs.values() for name in PROBED):
        yield Section("Attention", "Sinks and entropy of all runs", [_curves(folder, found, PROBED, "attention")])
    yield Section("Runs", "Runs without a result", [_missing(folder, sweep)])
    given: list[tuple[str, Sweep | Growth]] = [("Begun", sweep)]
    given += [(f"Given {len(growth.runs)} runs more", growth) for growth in sweep.grown]
    settings = [
        f"{what} {one.since} at commit {one.commit or 'unknown'} with: launch.py sweep {' '.join(one.command)}"
        for what, one in given
    ]
    yield Section("Settings", "Settings", settings)


def _by_key(found: Sequence[Arm], metric: str, asked: bool) -> Picture | str:
    """The metric on the first key, a line for each value of the others; where that would not be clear and was not asked for, by arm."""
    drawn = [arm for arm in found if arm.values]
    if not drawn:
        return f"No run that is over has {metric} as a finite number."
    if not drawn[0].keys:
        return "No key but the seed varies."
    key = next(iter(drawn[0].keys))
    if not (asked or _is_grid(found)) or _are_long([arm.keys[key] for arm in drawn]):
        return _by_arm(drawn, metric)
    figure, (ax,) = panels(1, columns=1, height=3.4, margin=(0.36, 0.6))
    place, numeric = _axis(ax, [arm.keys[key] for arm in drawn])
    lines = {label: [arm for arm in drawn if _label(arm, 1) == label] for label in dict.fromkeys(_label(a, 1) for a in drawn)}
    for index, (label, members) in enumerate(lines.items()):
        points = sorted(((place[repr(arm.keys[key])], arm.estimate, arm) for arm in members), key=lambda point: point[0])
        aside = 0.0 if numeric else 0.5 * ((index + 0.5) / len(lines) - 0.5)
        x, y = [one[0] + aside for one in points], [one[1].mean for one in points]
        half = [0.0 if math.isnan(one[1].half) else one[1].half for one in points]
        style = {"color": run_colour(index), "linestyle": run_dash(index) if numeric else "", "marker": "o", "markersize": 5}
        ax.errorbar(x, y, half, capsize=3, label=label if index < MOST_NAMED else "_", **style)
        seeds = [(at + aside, value) for at, _, arm in points for value in arm.values.values()]
        ax.plot(*zip(*seeds), linestyle="", marker=".", markersize=4, alpha=0.35, color=run_colour(index))
    ax.set(xlabel=key, ylabel=metric, title=f"{metric} by {key}")
    value_axis(ax)
    if len(lines) > 1:
        ax.legend(loc="best", title=", ".join(list(drawn[0].keys)[1:]))
    return picture("metric", figure, _caption(drawn))


def _by_arm(drawn: Sequence[Arm], metric: str) -> Picture:
    """The metric of each arm, one below the other, by what sets it apart."""
    names, key = names_of(drawn), next(iter(drawn[0].keys))
    left = min(0.07 * max(map(len, names)) + 0.3, WIDTH / 2)
    figure, (ax,) = panels(1, columns=1, height=max(2.0, 0.24 * len(names)), left=left, margin=(0.36, 0.6))
    for place, arm in enumerate(drawn):
        mean, half = arm.estimate.mean, 0.0 if math.isnan(arm.estimate.half) else arm.estimate.half
        ax.errorbar(mean, place, xerr=half, capsize=3, marker="o", markersize=5, color=run_colour(0))
        ax.plot(list(arm.values.values()), [place] * len(arm.values), linestyle="", marker=".", alpha=0.5, color=run_colour(1))
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel=metric, ylim=(len(names) - 0.5, -0.5), title=f"{metric} by {key if len(drawn[0].keys) == 1 else 'arm'}")
    ax.grid(axis="x")
    return picture("metric", figure, _caption(drawn))


def _is_grid(found: Sequence[Arm]) -> bool:
    """Whether there is an arm for each combination of the values of its keys."""
    return len(found) == math.prod(len({repr(arm.keys[key]) for arm in found}) for key in found[0].keys)


def _are_long(values: Sequence[Any]) -> bool:
    """Whether values that are no numbers have no room beside each other."""
    return not _numeric(values) and 0.075 * sum(len(value) for value in {str(value) for value in values}) > WIDTH - 1


def _caption(drawn: Sequence[Arm]) -> str:
    counts = sorted({len(arm.values) for arm in drawn})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    caption = f"Large points: mean of n = {seeds} seeds; bars: its {LEVEL:.0%} t interval; small points: seeds."
    return caption + (" Where n = 1 there is no interval." if counts[0] == 1 else "")


def _numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _axis(ax: Axes, values: Sequence[Any]) -> tuple[dict[str, float], bool]:
    """Where each value stands, and whether all are numbers: these by value, others in order."""
    numeric = _numeric(values)
    there = list({repr(value): value for value in values}.items())
    if not numeric:
        ax.set_xticks(range(len(there)), [str(value) for _, value in there])
        return {name: float(index) for index, (name, _) in enumerate(there)}, False
    if min(values) > 0 and max(values) >= 10 * min(values):
        ax.set_xscale("log")
    ax.set_xticks(sorted({float(value) for value in values}))
    ax.xaxis.set_major_formatter(FuncFormatter(short))
    ax.xaxis.set_minor_formatter(NullFormatter())
    return {name: float(value) for name, value in there}, True


def _table(folder: Path, found: Sequence[Arm], metric: str, baseline: str | None, better: Better) -> str:
    """A line an arm, the best first, each less the arm of `baseline`, or less the best where none is given."""
    order = best_first(found, better)
    beside = (
        dict.fromkeys(map(id, found), order[0]) if baseline is None else dict(zip(map(id, found), baselines(found, baseline)))
    )
    keys = list(found[0].keys)
    head = [*keys, "n", metric, f"{LEVEL:.0%} interval", f"less {'the best' if baseline is None else baseline}", "pairs"]
    if baseline is not None:
        head.append("effective speed-up")
    rows: list[list[str | tuple[str, str]]] = []
    for arm in order:
        base = beside[id(arm)]
        mean = arm.estimate
        row: list[str | tuple[str, str]] = [*map(str, arm.keys.values()), f"{mean.count} of {len(arm.runs)}"]
        row += [_number(mean.mean), _interval(mean)]
        apart = None if base is None or base is arm else difference(arm, base)
        if base is arm:
            row += ["the best" if baseline is None and arm.values else "–" if baseline is None else "baseline", ""]
        else:
            row += ["–", "0"] if apart is None else [_difference(apart), str(apart.count)]
        if baseline is not None:
            row.append("" if base is None or base is arm else _speed_up(fronts.speed_up(folder, arm, base, metric, better)))
        rows.append(row)
    note = f"The best first. Means over seeds, with {LEVEL:.0%} intervals by Student's t; of a single seed there is none."
    other = "the best arm" if baseline is None else "the arm that is otherwise the same"
    note += (
        f" Differences are of runs with the same seeds, from {other}, with the interval of their mean: they tell arms apart that the "
        "intervals of the means do not."
    )
    if baseline is None:
        note += hint(found)
    else:
        note += (
            " The effective speed-up is the FLOPs after which the baseline is as good as the arm at its end, over those of the arm: the "
            "geometric mean over seeds, below 1 where the arm is worse. With > the baseline of some seed never was so good, and all of its "
            "training is counted; with < it was better when first validated. A dash: the bound would say nothing. Before its end a schedule "
            "has not brought the baseline as far as a shorter one would have, so that the speed-up of what is a little better is too large."
        )
    return lead(note) + table(head, rows, numbers=range(len(keys), len(head)), style="dense")


def _number(value: float, sign: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:{sign}.4f}".replace("-", "−")


def _interval(one: Estimate) -> str:
    if one.count < 2:
        return "single seed" if one.count else "–"
    return f"{_number(one.mean - one.half)} to {_number(one.mean + one.half)}"


def _difference(one: Estimate) -> str | tuple[str, str]:
    if one.count < 2:
        return _number(one.mean, "+")
    return _number(one.mean, "+"), f" {_number(one.mean - one.half, '+')} to {_number(one.mean + one.half, '+')}"


def _speed_up(one: fronts.SpeedUp) -> str | tuple[str, str]:
    """Factors, with their interval; a dash with the reason where a bound would mislead."""
    found = one.factor
    if not found.count:
        return "–"
    if one.at_least and one.at_most:
        return "–", " bounded from both sides; validate more often"
    if one.at_least and one.worse:
        return "–", " worse in the mean, better in some seeds"
    mean = f"{'> ' if one.at_least else '< ' if one.at_most else ''}{math.exp(found.mean):.2f}×"
    if found.count < 2 or one.at_least or one.at_most:
        return mean
    return mean, f" {math.exp(found.mean - found.half):.2f} to {math.exp(found.mean + found.half):.2f}"


def _sensitivity(folder: Path, found: Sequence[Arm]) -> str:
    note = (
        "The mean over the swept learning rates of min(final loss, loss at the start), less the best final loss (2309.14322); runs that "
        "diverged count as the loss at the start, here the mean of the first logged training losses. It depends on the grid."
    )
    told = sensitivities(folder, found)
    head = [*told[0].keys, "learning rates", "loss at the start", "whole seeds", "sensitivity", f"{LEVEL:.0%} interval"]
    rows = []
    for one in told:
        mean = one.over_seeds
        cells = [str(one.rates), _number(one.start), str(mean.count), _number(mean.mean), _interval(mean)]
        rows.append([*map(str, one.keys.values()), *cells])
    return lead(note) + table(head, rows, numbers=range(len(told[0].keys), len(head)), style="dense")


def _curves(folder: Path, found: Sequence[Arm], names: dict[str, tuple[str, str]], name: str) -> Picture:
    """A panel a metric with all runs, coloured by the first key."""
    figure, axes = panels(len(names), columns=len(names), height=3.2, margin=(0.36, 0.5))
    labels = list(dict.fromkeys(_first(arm) for arm in found))
    for ax, (metric, (words, unit)) in zip(axes, names.items()):
        for arm in found:
            index = labels.index(_first(arm))
            for run in arm.runs.values():
                pairs = claims.logged(folder, run, metric)
                if not pairs:
                    continue
                steps = np.array([step for step, _ in pairs])
                values = np.array([math.nan if value is None else value for _, value in pairs])
                line = thin(steps, np.where(np.isfinite(values), smooth(values), math.nan))
                ax.plot(*line, color=run_colour(index), linestyle=run_dash(index), linewidth=0.9, alpha=0.8)
        ax.set(title=words, ylabel=unit)
        value_axis(ax)
        step_axis(ax)
    lines = [Line2D([], [], color=run_colour(i), linestyle=run_dash(i)) for i in range(len(labels))]
    axes[0].legend(lines[:MOST_NAMED], labels[:MOST_NAMED], loc="best")
    return picture(
        name,
        figure,
        "A line for each run that logged any, failed and unfinished ones too: its exponential mean, which ends where the run diverged.",
    )


def _first(arm: Arm) -> str:
    return next((f"{key} = {value}" for key, value in arm.keys.items()), "all runs")


def _label(arm: Arm, start: int) -> str:
    return ", ".join(str(value) for value in list(arm.keys.values())[start:])


def _missing(folder: Path, sweep: Sweep) -> str:
    rows = []
    for run in sweep.runs:
        state, ended = claims.status(folder, run), claims.outcome(folder, run)
        if state not in claims.ENDED:
            rows.append([run.name, state, "" if ended is None else ended.error or ended.why or ""])
    if not rows:
        return "All runs have one."
    return Markup(table(["run", "status", "why"], rows))
