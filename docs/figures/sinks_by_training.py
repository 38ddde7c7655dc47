"""Draws `docs/figures/sinks_by_training.png` from the folder of `launch.py sweep sinks --on training` and prints its table.

python docs/figures/sinks_by_training.py sweeps/sinks_training
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

from plait.train.probes.sinks import THRESHOLD
from plait.train.report.style import FAINT, INK, MUTED, PAPER, RC, RUN_COLOURS
from plait.train.run_folder.probe_files import read_probes
from plait.train.sweep.arms import Arm, arms
from plait.train.sweep.record import read
from plait.train.sweep.workers import claims

OUT = Path(__file__).with_suffix(".png")
METRIC = "task/backcopy/copy_accuracy"
TITLES = {
    "optimizer.learning_rate": "Learning rate",
    "data.task.train_rows": "Different rows",
    "data.seq_len": "Tokens of a sequence",
    "data.task.num_sequences": "Sequences of a row",
    "model.num_layers": "Layers",
    "model.parallel_block": "MLP behind the head",
    "model.mixers.softmax.positions": "Positions",
}
"""By the key that varies, the title of its panel; the first of them says what an arm is of."""
LAST = 5
"""Probes at the end that are averaged."""


def differs(keys: Mapping[str, Any], plain: Mapping[str, Any]) -> tuple[str, str]:
    """The panel of an arm and what it has in place of the preset's."""
    there = [key for key in keys if keys[key] != plain[key]]
    key = next(key for key in ("data.task.num_sequences", *TITLES) if key in there)
    value = f"norm {keys['model.norm']}" if key == "model.parallel_block" else "none" if keys[key] is None else str(keys[key])
    return key, value


def measured(folder: Path, arm: Arm) -> list[tuple[np.ndarray, np.ndarray, tuple[object, ...]]]:
    """Of each seed the steps of its probes, the weight on the first token, and that at the end, the published rate, onset and accuracy."""
    found = []
    for seeds, value in sorted(arm.values.items()):
        probes = read_probes(claims.run_folder(folder, arm.runs[seeds]))
        sink = np.nanmax(probes.arrays["sink"][..., 0], axis=(1, 2))
        published = probes.arrays.get("sink_k_eps")  # of sequences of at least 64 tokens
        rate = None if published is None else round(float(np.nanmax(published[-LAST:, ..., 0], axis=(1, 2)).mean()))
        onset = next((int(step) for step, weight in zip(probes.steps, sink) if weight > THRESHOLD), None)
        found.append((probes.steps, sink, (round(float(sink[-LAST:].mean()), 2), rate, onset, round(value, 3))))
    return found


def main(folder: Path) -> None:
    """Writes the figure and prints a line an arm: weight on the first token, published rate, onset and accuracy, by seed."""
    found = [one for one in arms(folder, read(folder), [], METRIC) if one.values]
    plain = found[0]
    with matplotlib.rc_context({**RC, "font.size": 9.5}):
        figure = Figure(figsize=(12.4, 5.4), facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        axes = dict(zip(TITLES, figure.subplots(2, 4, sharey=True).ravel()))
        drawn = dict.fromkeys(TITLES, 0)
        for one in found:
            steps, curves, rows = zip(*measured(folder, one))
            key, label = ("", "the preset") if one is plain else differs(one.keys, plain.keys)
            print(key, label, *rows)
            for panel in TITLES if one is plain else (key,):
                colour = MUTED if one is plain else RUN_COLOURS[drawn[panel]]
                drawn[panel] += one is not plain
                for curve in curves:
                    axes[panel].plot(steps[0], curve, color=colour, linewidth=0.7, alpha=0.5)
                axes[panel].plot(steps[0], np.mean(curves, axis=0), color=colour, linewidth=2, label=label)
        for panel, ax in axes.items():
            ax.axhline(THRESHOLD, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            ax.set_title(TITLES[panel], color=INK, loc="left")
            ax.set(xlim=(0, None), ylim=(0, 1))
            ax.grid(color=FAINT)
            ax.legend(loc="upper left", ncols=2, frameon=False, fontsize=8)
        for ax in (axes["optimizer.learning_rate"], axes["model.num_layers"]):
            ax.set_ylabel("α₁ of the strongest head")
        for ax in list(axes.values())[3:]:
            ax.set_xlabel("step")
        figure.axes[-1].set_axis_off()
        figure.savefig(OUT, dpi=110)
    print(OUT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
