"""Draws `docs/figures/plateau.png` from the folder of `launch.py sweep plateau` and prints its table.

python docs/figures/plateau.py sweeps/plateau
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from plait.train.report.style import FAINT, INK, PAPER, RC, RUN_COLOURS
from plait.train.sweep.arms import arms
from plait.train.sweep.record import read
from plait.train.sweep.workers import claims

OUT = Path(__file__).with_suffix(".png")
METRICS = {
    "loss/val": "validation loss, nats",
    "residual/similarity": "cosine of tokens, last layer",
    "predictions/repetition": "repeated predictions",
}


def main(folder: Path) -> None:
    """Writes the figure and prints, by arm, metric and seed, the first value, the largest and its step, and the last."""
    found = [one for one in arms(folder, read(folder), ["model.pattern"], "loss/val") if one.values]
    with matplotlib.rc_context({**RC, "font.size": 9.5}):
        figure = Figure(figsize=(12.4, 6.4), facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(METRICS), len(found), sharex="col", squeeze=False)
        for column, one in zip(axes.T, found):
            config = next(iter(one.runs.values())).config
            on = "text" if config.data.task.reads_text else "moving-window sums"
            name = f"{config.model.pattern.replace('gated_deltanet', 'gated DeltaNet')}, on {on}"
            column[0].set_title(name, color=INK, loc="left")
            for (metric, label), ax in zip(METRICS.items(), column):
                for colour, (seeds, run) in zip(RUN_COLOURS, sorted(one.runs.items())):
                    curve = [(step, value) for step, value in claims.logged(folder, run, metric) if value is not None]
                    ax.plot(*zip(*curve), color=colour, label=f"seed {run.config.seed}")
                    most = max(curve, key=lambda point: point[1])
                    print(name, metric, seeds[0], *(f"{value:.3f} at {step}" for step, value in (curve[0], most, curve[-1])))
                ax.set(
                    xlim=(0, None), ylim=(0, None if metric == "loss/val" else 1.02), ylabel=label if ax in axes[:, 0] else None
                )
                ax.grid(color=FAINT)
            column[-1].set_xlabel("step")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(OUT, dpi=110)
    print(OUT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
