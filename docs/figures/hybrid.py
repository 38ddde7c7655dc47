"""Draws `docs/figures/hybrid.png`, or of `--on recall` `hybrid_recall.png`, from the folder of `launch.py sweep hybrid` and prints the table
of docs/reproductions.md.

python docs/figures/hybrid.py sweeps/hybrid
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from plait.train.report.style import FAINT, INK, PAPER, RC, RUN_COLOURS
from plait.train.sweep.arms import Arm, arms, difference
from plait.train.sweep.record import read

PATTERN = "model.pattern"
SHARES = {"{}": 0, "{}*3,softmax": 25, "{},softmax": 50, "{},softmax*3": 75}
FIGURES = {
    "task/mqar/accuracy": ("hybrid_recall.png", "Recall of four pairs, a dot for each seed", "accuracy"),
    "loss/val": ("hybrid.png", "Speeches", "validation loss, nats per byte"),
}
"""By metric a file, a title and a label; the first whose metric there is."""
SHARES_OF_ANSWERS = ("task/mqar/accuracy",)
"""Metrics that are drawn by seed, and the others with 95% intervals."""


def placed(arm: Arm) -> tuple[str, int]:
    """The linear mixer and the share of full layers in percent."""
    pattern = arm.keys[PATTERN]
    name = pattern.split(",")[0].partition("*")[0]
    return name, 100 if pattern == "softmax" else SHARES[pattern.replace(name, "{}", 1)]


def main(folder: Path) -> None:
    """Writes the figure and prints a line an arm."""
    sweep = read(folder)
    metric, found = next(
        (metric, some) for metric in FIGURES if (some := [one for one in arms(folder, sweep, [PATTERN], metric) if one.values])
    )
    name, title, label = FIGURES[metric]
    draw({placed(one): one for one in found}, metric, title, label, Path(__file__).with_name(name))


def draw(found: Mapping[tuple[str, int], Arm], metric: str, title: str, label: str, out: Path) -> None:
    """A line a linear mixer, over the share of full layers."""
    full = found["softmax", 100]
    names = list(dict.fromkeys(name for name, share in found if share < 100))
    with matplotlib.rc_context({**RC, "font.size": 9.5}):
        figure = Figure(figsize=(5.6, 3.8), facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        for index, name in enumerate(names):
            mine = {share: one for (of, share), one in sorted(found.items()) if of == name}
            x = np.array(list(mine)) + 0.8 * (index - 2.5)
            mean, half = (np.array([getattr(one.estimate, part) for one in mine.values()]) for part in ("mean", "half"))
            style = {"color": RUN_COLOURS[index], "marker": "o", "markersize": 4}
            if metric in SHARES_OF_ANSWERS:  # an interval of a mean would leave [0, 1]
                ax.plot(x, mean, color=RUN_COLOURS[index], linewidth=1.4, label=name)
                seeds = [(at, value) for at, one in zip(x, mine.values()) for value in one.values.values()]
                ax.plot(*zip(*seeds), linestyle="none", **style)
            else:
                ax.errorbar(x, mean, np.nan_to_num(half), label=name, elinewidth=0.9, linewidth=1.4, capsize=3, **style)
        ax.axhline(full.estimate.mean, color=INK, linestyle=":", linewidth=1.2, label="softmax alone")
        if metric in SHARES_OF_ANSWERS:
            ax.set_ylim(0, 1.05)
        else:
            ax.axhspan(*(full.estimate.mean + sign * full.estimate.half for sign in (-1, 1)), color=FAINT, alpha=0.6, linewidth=0)
        ax.set_title(title, color=INK, loc="left")
        ax.set(xlabel="softmax layers of four, in percent", ylabel=label, xticks=[0, 25, 50, 75])
        ax.grid(color=FAINT)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(out, dpi=110)
    for place, one in found.items():
        less = difference(one, full)
        values = " ".join(f"{value:.3f}" for _, value in sorted(one.values.items()))
        print(metric, *place, values, f"{one.estimate.mean:.3f}", f"less softmax {less.mean:+.3f} +- {less.half:.3f}")
    for name in names:
        ratios = [one for (of, _), one in sorted(found.items()) if of == name]
        pairs = [difference(*pair) for pair in itertools.permutations(ratios, 2)]
        largest = max(pairs, key=lambda one: one.mean)
        apart = sum(one.mean > one.half for one in pairs)
        print(metric, name, f"between ratios {largest.mean:.3f} +- {largest.half:.3f}, {apart} of {len(pairs) // 2} without 0")
    print(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
