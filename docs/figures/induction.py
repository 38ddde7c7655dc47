"""Draws `docs/figures/induction.png` from the folder of `launch.py sweep glitches --on induction` and prints its table.

python docs/figures/induction.py sweeps/induction
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from plait.train.probes.induction import THRESHOLD
from plait.train.report.style import FAINT, INK, MUTED, PAPER, RC, RUN_COLOURS
from plait.train.sweep.arms import arms
from plait.train.sweep.record import read
from plait.train.sweep.workers import claims

OUT = Path(__file__).with_suffix(".png")
METRIC, LOSS, SCORE = "task/mqar/accuracy", "loss/val", "attn/induction"
LEARNED, GUESSED = 0.9, 1.0
"""Accuracy of what is learned, and a loss in nats below that of a guess among a row's four values."""


def main(folder: Path) -> None:
    """Writes the figure and prints, by seed, accuracy at the end and the steps at which it, the loss and a head are there first."""
    found = [one for one in arms(folder, read(folder), ["model.pattern", "model.num_layers"], METRIC) if one.values]
    with matplotlib.rc_context({**RC, "font.size": 9.5}):
        figure = Figure(figsize=(12.4, 4.6), facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, len(found), sharex=True, sharey="row", squeeze=False)
        for (above, below), one in zip(axes.T, found):
            layers = one.keys["model.num_layers"]
            name = f"{one.keys['model.pattern']}, {layers} layer{'s' * (layers > 1)}"
            rows = []
            for colour, (seeds, run) in zip(RUN_COLOURS, one.runs.items()):
                accuracy, losses, scores = (claims.logged(folder, run, metric) for metric in (METRIC, LOSS, SCORE))
                above.plot(*zip(*losses), color=colour, label=f"seed {run.config.seed}")
                below.plot(*zip(*scores), color=colour)
                first = lambda curve, least: next((step for step, value in curve if value > least), None)
                fallen = [(step, -value) for step, value in losses]
                rows.append(
                    (round(one.values[seeds], 3), first(accuracy, LEARNED), first(fallen, -GUESSED), first(scores, THRESHOLD))
                )
            print(name, *rows)
            below.axhline(THRESHOLD, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            above.set_title(name, color=INK, loc="left")
            below.set(xlabel="step", xlim=(0, None), ylim=(0, 1))
            above.set(ylim=(0, None))
            for ax in (above, below):
                ax.grid(color=FAINT)
        axes[0, 0].set_ylabel("validation loss, nats")
        axes[1, 0].set_ylabel("strongest induction head")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(OUT, dpi=110)
    print(OUT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
