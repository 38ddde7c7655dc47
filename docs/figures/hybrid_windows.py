"""Draws `docs/figures/hybrid_windows.png` from the folder of `launch.py sweep hybrid --on windows` and prints its table.

python docs/figures/hybrid_windows.py sweeps/windows
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from plait.train.report.style import FAINT, INK, PAPER, RC, RUN_COLOURS
from plait.train.sweep.arms import Arm, arms
from plait.train.sweep.record import read
from plait.train.sweep.workers import claims

OUT = Path(__file__).with_suffix(".png")
METRIC = "task/mqar/accuracy"
LEARNED = 0.9


def named(arm: Arm) -> tuple[str, bool]:
    """What the other three layers are, and whether the full layer has positions."""
    model = next(iter(arm.runs.values())).config.model
    layers = f"window of {model.mixers['neighborhood'].window_size}" if "neighborhood" in model.mixers else "gated DeltaNet"
    return layers, model.mixers["softmax"].positions is not None


def main(folder: Path) -> None:
    """Writes the figure and prints a line an arm: accuracy at the end and the first evaluation above 0.9, by seed."""
    found = {named(one): one for one in arms(folder, read(folder), ["model.pattern"], METRIC) if one.values}
    layers = list(dict.fromkeys(name for name, _ in found))
    with matplotlib.rc_context({**RC, "font.size": 9.5}):
        figure = Figure(figsize=(12.4, 3.0), facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        axes = np.atleast_1d(figure.subplots(1, len(layers), sharey=True))
        for (name, rotary), one in found.items():
            ax = axes[layers.index(name)]
            ends, firsts = [], []
            for index, run in enumerate(run for seeds, run in one.runs.items() if seeds in one.values):
                steps, values = zip(*claims.logged(folder, run, METRIC))
                label = f"{'rotary' if rotary else 'no positions'}, seed {run.config.seed}"
                ax.plot(steps, values, "-" if rotary else "--", color=RUN_COLOURS[index], linewidth=1.5, label=label)
                ends.append(round(float(values[-1]), 3))
                firsts.append(next((step for step, value in zip(steps, values) if value > LEARNED), None))
            print(name, "rotary" if rotary else "none", ends, firsts)
            ax.set_title(name, color=INK, loc="left")
            ax.set(xlabel="step", xlim=(0, None), ylim=(0, 1.03))
            ax.grid(color=FAINT)
        axes[0].set_ylabel("accuracy")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
        figure.savefig(OUT, dpi=110)
    print(OUT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
