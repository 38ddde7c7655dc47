"""Draws `docs/figures/learning_rate.png` from the folder of `launch.py sweep learning_rate` and prints the table of docs/reproductions.md.

python docs/figures/learning_rate.py sweeps/learning_rate
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from plait.train.report.style import FAINT, INK, PAPER, RC, RUN_COLOURS
from plait.train.sweep.arms import RATE, arms, sensitivities
from plait.train.sweep.record import read

OUT = Path(__file__).with_suffix(".png")
NAMES = {
    "model.mixers.softmax.qk_norm": (True, "QK-norm"),
    "model.z_loss": (1e-4, "z-loss"),
    "model.sigma_reparam": ("spectral", "sigmaReparam"),
    "optimizer": ("muon", "Muon"),
}


def named(keys: Mapping[str, Any]) -> str:
    """An arm in words."""
    return next((name for key, (value, name) in NAMES.items() if keys.get(key) == value), "plain")


def main(folder: Path) -> None:
    """Writes the figure, a panel a width, and prints losses and sensitivities."""
    sweep = read(folder)
    found = [one for one in arms(folder, sweep, [RATE], "loss/val", ["model.d_model"]) if one.values]
    widths = sorted({one.keys["model.d_model"] for one in found})
    labels = list(dict.fromkeys(named(one.keys) for one in found))
    with matplotlib.rc_context({**RC, "font.size": 9.5}):
        figure = Figure(figsize=(5.6 * len(widths), 3.6), facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
        for ax, width in zip(axes, widths):
            for index, label in enumerate(labels):
                mine = sorted(
                    (a for a in found if named(a.keys) == label and a.keys["model.d_model"] == width), key=lambda a: a.keys[RATE]
                )
                x = np.array([one.keys[RATE] for one in mine]) * 1.05 ** (index - 2)
                mean, half = (np.array([getattr(one.estimate, name) for one in mine]) for name in ("mean", "half"))
                ax.errorbar(
                    x, mean, np.nan_to_num(half), color=RUN_COLOURS[index], marker="o", markersize=4, capsize=3, label=label
                )
            ax.set_title(f"width {width}", color=INK, loc="left")
            ax.set(xscale="log", xlabel="learning rate", xticks=sorted({one.keys[RATE] for one in found}))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.grid(color=FAINT)
        axes[0].set_ylabel("validation loss, nats per byte")
        axes[0].legend(frameon=False)
        figure.savefig(OUT, dpi=110)
    print(OUT)
    for one in found:
        mean = one.estimate
        print(
            one.keys["model.d_model"],
            named(one.keys),
            one.keys[RATE],
            f"{mean.mean:.3f} +- {mean.half:.3f}",
            mean.count,
            sorted(one.values.values()),
        )
    for told in sensitivities(folder, found):
        one = told.over_seeds
        print(
            told.keys["model.d_model"],
            named(told.keys),
            f"sensitivity {one.mean:.3f} +- {one.half:.3f}",
            one.count,
            told.rates,
            told.start,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
