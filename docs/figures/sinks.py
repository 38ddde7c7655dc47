"""Draws `docs/figures/sinks.png` from runs of `lm_sinks`: `python docs/figures/sinks.py sweeps/sinks`.

The argument is the folder of `launch.py sweep sinks`, in which each run's metrics, probes and events are read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from plait.configs.experiment import ExperimentConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.train.probes.sinks import THRESHOLD
from plait.train.report.style import FAINT, INK, MUTED, PAPER, RC, RUN_COLOURS
from plait.train.run_folder.lines import EVENTS, read_lines
from plait.train.run_folder.probe_files import read_probes
from plait.train.sweep import claims
from plait.train.sweep.record import read

OUT = Path(__file__).with_suffix(".png")
PANELS = {
    "softmax": (SoftmaxConfig().gate, SoftmaxConfig().normalizer),
    "softmax with a gate of each head": ("headwise", "softmax"),
    "sigmoid, rows divided by their sum": (None, "sigmoid"),
}
"""Title by gate and normaliser, of runs that are otherwise the preset's."""


def main(folder: Path) -> None:
    """Writes the figure; raises ValueError where a panel has no run that is over."""
    with matplotlib.rc_context({**RC, "font.size": 10}):
        figure = Figure(figsize=(11.2, 3.4), facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(PANELS), sharey=True)
        for (title, which), ax, colour in zip(PANELS.items(), axes, RUN_COLOURS):
            runs = list(_runs(folder, which))
            if not runs:
                raise ValueError(f"{folder} has no run of {title!r} that is over; run 'launch.py sweep sinks --out {folder}'")
            for number, (steps, alpha, onset) in enumerate(runs):
                ax.plot(steps, alpha, color=colour, alpha=1 - 0.25 * number, linewidth=1.8, label=f"seed {number}")
                if onset is not None:
                    ax.plot(onset, np.interp(onset, steps, alpha), "o", color=colour, markeredgecolor=PAPER, markersize=7)
            ax.axhline(THRESHOLD, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            ax.set_title(title, color=INK, loc="left")
            ax.set(xlabel="step", ylim=(0, 1), xlim=(0, None))
            ax.grid(color=FAINT)
        axes[0].set_ylabel("α₁, weight on the first token")
        axes[0].text(
            0.98,
            THRESHOLD - 0.02,
            f"a sink above {THRESHOLD}",
            color=MUTED,
            ha="right",
            va="top",
            transform=axes[0].get_yaxis_transform(),
        )
        figure.savefig(OUT, dpi=150)
    print(OUT)


def _runs(folder: Path, which: tuple[str | None, str]) -> Iterator[tuple[np.ndarray, np.ndarray, int | None]]:
    """Steps, α₁ of the strongest head, and the step of its onset, by seed."""
    plain: Sequence[str] = ("model.mixers.softmax.gate", "model.mixers.softmax.normalizer", "seed", "data.seed")
    for run in claims_over(folder):
        config: ExperimentConfig = run.config
        softmax = config.model.mixers["softmax"]
        if (softmax.gate, softmax.normalizer) == which and set(run.overrides) <= set(plain):
            at = folder / "runs" / run.name
            probes = read_probes(at)
            events = [line for _, line in read_lines(at / EVENTS)[0] if line["kind"] == "sink_onset"]
            yield probes.steps, np.nanmax(probes.arrays["sink"][..., 0], axis=(1, 2)), events[0]["step"] if events else None


def claims_over(folder: Path):
    return [run for run in read(folder).runs if claims.status(folder, run) in claims.OVER]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
