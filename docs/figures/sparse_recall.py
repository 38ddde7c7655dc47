"""Draws `docs/figures/sparse_recall.png` from the folder of `launch.py sweep sparse_recall` and prints its table.

python docs/figures/sparse_recall.py sweeps/sparse
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from plait.configs.experiment import ExperimentConfig
from plait.train.report.style import FAINT, INK, PAPER, RC, RUN_COLOURS
from plait.train.sweep.arms import arms
from plait.train.sweep.fronts import density
from plait.train.sweep.record import read

OUT = Path(__file__).with_suffix(".png")
METRIC = "task/mqar/accuracy"
WIDEST = 1.8
"""Density at the right end; what has more stands there."""
STEPS = 200
"""Of all runs but those that say so."""
LABELS = {
    "moba": (True, 5),
    "hcam": (True, 9),
    "softmax": (False, 10),
    "routing": (False, -6),
    "bigbird": (True, 6),
    "window": (False, -6),
}
"""Where a name stands beside its last point: on the left, and points above it."""


def of_last(config: ExperimentConfig) -> float:
    """The density of the last layer alone."""
    name = config.model.pattern.rpartition(",")[2]
    model = dataclasses.replace(config.model, num_layers=1, pattern=name, mixers={name: config.model.mixers[name]})
    return density(dataclasses.replace(config, model=model))


def main(folder: Path) -> None:
    """Writes the figure and prints a line an arm: density of the last layer, and accuracy by seed."""
    found = [one for one in arms(folder, read(folder), ["model.pattern"], METRIC) if one.values]
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in found:
        config = next(iter(one.runs.values())).config
        name = one.keys["model.pattern"].rpartition(",")[2]
        window = getattr(config.model.mixers[name], "window_size", None)
        if name == "softmax" and window is not None:
            name = "window"
        if config.steps > STEPS:
            name = f"{name}, {config.steps:,} steps"
        lines.setdefault(name, []).append((of_last(config), one.estimate.mean))
        print(name, f"{of_last(config):.2f}", *(f"{value:.2f}" for value in one.values.values()))
    with matplotlib.rc_context({**RC, "font.size": 9.5}):
        figure = Figure(figsize=(6.2, 4.2), facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        for index, (name, points) in enumerate(lines.items()):
            ordered = sorted(points)
            x, y = zip(*((min(where, WIDEST), value) for where, value in ordered))
            colour = RUN_COLOURS[index % len(RUN_COLOURS)]
            ax.plot(x, y, "o-", color=colour, linewidth=1.4, markersize=5)
            label = name if ordered[-1][0] <= WIDEST else f"{name} ({ordered[-1][0]:.0f})"
            left, dy = LABELS.get(name, (False, 0))
            ax.annotate(
                label,
                (x[-1], y[-1]),
                (-7 if left else 7, dy),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                color=colour,
            )
        ax.set_title("Recall by the last layer's density", color=INK, loc="left")
        ax.set(
            xlabel="operations between tokens, of full attention's (SEA's is beyond the axis)",
            ylabel="accuracy",
            ylim=(0, 1.08),
            xlim=(0.2, WIDEST + 0.15),
        )
        ax.grid(color=FAINT)
        figure.savefig(OUT, dpi=110)
    print(OUT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
