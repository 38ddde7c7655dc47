"""Draws `docs/figures/sinks.png` from the folder of `launch.py sweep sinks`, or from several, and prints its table.

python docs/figures/sinks.py sweeps/sinks
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sinks_by_training import METRIC, measured

from plait.configs.presets import preset
from plait.train.probes.sinks import THRESHOLD
from plait.train.report.panels.costs import names_of
from plait.train.report.style import FAINT, INK, MUTED, PAPER, RC, RUN_COLOURS
from plait.train.run_folder.lines import EVENTS, read_lines
from plait.train.run_folder.probe_files import read_probes
from plait.train.sweep.arms import arms
from plait.train.sweep.record import read
from plait.train.sweep.workers import claims

OUT = Path(__file__).with_suffix(".png")
PANELS = {
    "softmax": ("softmax", {}),
    "softmax, gated head": ("softmax", {"gate": "headwise"}),
    "sigmoid, rows over their sum": ("softmax", {"normalizer": "sigmoid"}),
    "ReLU, rows over their sum": ("relu_attention", {}),
}
"""Title of a panel, its pattern, and what its softmax layer has that the preset's has not."""


def main(folders: Sequence[Path]) -> None:
    """Writes the figure and prints a line an arm: weight on the first token, published rate, onset and accuracy, by seed.

    Raises ValueError where a panel has no run that is over.
    """
    with matplotlib.rc_context({**RC, "font.size": 9.5}):
        figure = Figure(figsize=(12.4, 3.2), facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(PANELS), sharey=True)
        for (title, what), ax in zip(PANELS.items(), axes):
            runs = [run for folder in folders for run in _runs(folder, *what)]
            if not runs:
                raise ValueError(f"no run of {title!r} is over; run 'launch.py sweep sinks --out {folders[0]}'")
            for (seed, steps, alpha, onset), colour in zip(runs, RUN_COLOURS):
                ax.plot(steps, alpha, color=colour, linewidth=1.8, label=f"seed {seed}")
                if onset is not None:
                    ax.plot(onset, np.interp(onset, steps, alpha), "o", color=colour, markeredgecolor=PAPER, markersize=8)
            ax.axhline(THRESHOLD, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            ax.set_title(title, color=INK, loc="left")
            ax.set(xlabel="step", ylim=(0, 0.8), xlim=(0, None))
            ax.grid(color=FAINT)
        axes[0].set_ylabel("α₁, mean weight on the first token")
        axes[0].legend(loc="upper left", ncols=len(runs), frameon=False)
        below = {"ha": "right", "va": "top", "color": MUTED, "transform": axes[0].get_yaxis_transform()}
        axes[0].text(0.98, THRESHOLD - 0.02, f"above {THRESHOLD}: a sink; dots: the event", **below)
        figure.savefig(OUT, dpi=150)
    for folder in folders:
        found = [one for one in arms(folder, read(folder), [], METRIC) if one.values]
        for name, one in zip(names_of(found), found):
            print(name, *(row for _, _, row in measured(folder, one)))
    print(OUT)


def _runs(folder: Path, pattern: str, options: dict[str, str]) -> Iterator[tuple[int, np.ndarray, np.ndarray, int | None]]:
    """Of the preset with these options of its softmax layer: seed, steps, α₁, and the step of its onset."""
    like = preset("lm_sinks")
    softmax = dataclasses.replace(like.model.mixers["softmax"], **options)
    for run in read(folder).runs:
        at = folder / "runs" / run.name
        model = run.config.model
        alike = (
            model.pattern == pattern
            and model.mixers.get("softmax", softmax) == softmax
            and run.config.optimizer == like.optimizer
        )
        if alike and claims.status(folder, run) in claims.OVER:
            probes = read_probes(at)
            onsets = [event["step"] for _, event in read_lines(at / EVENTS)[0] if event["kind"] == "sink_onset"]
            yield run.config.seed, probes.steps, np.nanmax(probes.arrays["sink"][..., 0], axis=(1, 2)), min(onsets, default=None)


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
