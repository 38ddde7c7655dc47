"""Draws `docs/figures/stabilisers.png` from the folder of `launch.py sweep stabilisers` and prints the table of docs/reproductions.md.

python docs/figures/stabilisers.py sweeps/stabilisers
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
from matplotlib.ticker import NullFormatter

from plait.train.report.style import FAINT, INK, PAPER, RC, RUN_COLOURS
from plait.train.sweep.arms import Arm, arms
from plait.train.sweep.record import read
from plait.train.sweep.workers import claims

OUT = Path(__file__).with_suffix(".png")
WARMUP = "optimizer.warmup_steps"
NAMES = {
    "model.sigma_reparam": ("spectral", "sigmaReparam"),
    "model.mixers.softmax.qk_norm": (True, "QK-norm"),
    "model.qk_clip.threshold": (20.0, "QK-clip 20"),
    "model.mixers.softmax.logit_soft_cap": (20.0, "soft cap 20"),
    "model.mixers.softmax.normalizer": ("sigmoid", "sigmoid"),
    "model.mixers.softmax.gate": ("elementwise", "gate"),
    "model.mixers.softmax.sink_logits": (True, "sink logits"),
}


def named(keys: Mapping[str, Any]) -> str:
    """An arm in words."""
    return next((name for key, (value, name) in NAMES.items() if keys.get(key) == value), "nothing")


def main(folder: Path) -> None:
    """Writes the figure and prints a line an arm."""
    found = [one for one in arms(folder, read(folder), [WARMUP], "loss/val") if one.values]
    labels = list(dict.fromkeys(named(one.keys) for one in found))
    with matplotlib.rc_context({**RC, "font.size": 9.5}):
        figure = Figure(figsize=(12.4, 4.1), facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
        for ax, name, title in zip(
            axes, ("attn/entropy_ratio", "attn/max_logit"), ("Entropy / log n, no warm-up", "Largest logit, no warm-up")
        ):
            for one in (one for one in found if not one.keys[WARMUP]):
                index = labels.index(named(one.keys))
                steps, curves = _curves(folder, one, name)
                style = "-" if index < len(RUN_COLOURS) else "--"
                ax.plot(steps, curves.mean(0), style, color=RUN_COLOURS[index % len(RUN_COLOURS)], label=labels[index])
            ax.set_title(title, color=INK, loc="left")
            ax.set(xlabel="step", xlim=(0, None))
            ax.grid(color=FAINT)
        axes[1].set(yscale="log")
        axes[1].yaxis.set_major_formatter("{x:g}")
        axes[1].yaxis.set_minor_formatter(NullFormatter())
        axes[0].set(ylim=(0, 1))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(labels), frameon=False)
        for one in found:
            warm = one.keys[WARMUP]
            place = labels.index(named(one.keys)) + (0.15 if warm else -0.15)
            values = list(one.values.values())
            label = None if named(one.keys) != labels[0] else "warm-up of 100 steps" if warm else "no warm-up"
            colour = RUN_COLOURS[1] if warm else RUN_COLOURS[0]
            axes[2].plot(values, [place] * len(values), "o", color=colour, markersize=5, alpha=0.8, label=label)
        axes[2].set_yticks(range(len(labels)), labels)
        axes[2].invert_yaxis()
        axes[2].set(xlabel="validation loss, nats per byte")
        axes[2].set_title("Loss at the end, a point a seed", color=INK, loc="left")
        axes[2].grid(color=FAINT)
        axes[2].legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        figure.savefig(OUT, dpi=110)
    print(OUT)
    for one in found:
        ends = {
            name: [round(float(curve[-1]), 3) for curve in _curves(folder, one, f"attn/{name}")[1]]
            for name in ("entropy_ratio", "max_logit")
        }
        losses = [round(value, 3) for value in one.values.values()]
        print(one.keys[WARMUP], named(one.keys), f"{one.estimate.mean:.3f} +- {one.estimate.half:.3f}", losses, ends)


def _curves(folder: Path, arm: Arm, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the metric of each seed at them."""
    logs = [claims.logged(folder, run, name) for seeds, run in arm.runs.items() if seeds in arm.values]
    return np.array([step for step, _ in logs[0]]), np.array(
        [[np.nan if value is None else value for _, value in one] for one in logs]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
