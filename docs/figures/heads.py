"""Draws `docs/figures/heads.png` from the folder of `launch.py sweep heads` and prints the table of docs/reproductions.md.

python docs/figures/heads.py sweeps/heads
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from plait.train.report.style import FAINT, INK, PAPER, RC, RUN_COLOURS
from plait.train.sweep.arms import Arm, arms, difference
from plait.train.sweep.fronts import flops
from plait.train.sweep.record import read

OUT = Path(__file__).with_suffix(".png")
PATTERN = "model.pattern"


def named(arm: Arm) -> str:
    """An arm in words."""
    model, pattern = next(iter(arm.runs.values())).config.model, arm.keys[PATTERN]
    mixer = model.mixers[pattern]
    if not pattern.startswith("moh+"):
        width = mixer.head_dim if pattern == "softmax" else model.d_model // mixer.num_heads
        return f"{pattern}, {mixer.num_heads} heads of {width}"
    name, every = pattern.removeprefix("moh+"), mixer.mixer.num_heads
    if mixer.experts == "all_but_one":
        return f"{name}, all but one of {every} mixed"
    return f"{name}, {mixer.num_shared_heads + mixer.top_k} of {every} active"


def main(folder: Path) -> None:
    """Writes the figure and prints a line an arm."""
    found = [one for one in arms(folder, read(folder), [PATTERN], "loss/val") if one.values]
    bases = {name: next(one for one in found if named(one).startswith(f"{name}, 8 heads")) for name in ("softmax", "gla")}
    with matplotlib.rc_context({**RC, "font.size": 9.5}):
        figure = Figure(figsize=(8.4, 4.2), facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        for place, one in enumerate(found):
            mixed = one.keys[PATTERN].startswith("moh+")
            values = list(one.values.values())
            ax.plot(values, [place] * len(values), "o", color=RUN_COLOURS[mixed], markersize=5, alpha=0.8)
            ax.plot([one.estimate.mean], [place], "|", color=RUN_COLOURS[mixed], markersize=16, markeredgewidth=2)
        for name, one in bases.items():
            places = [place for place, each in enumerate(found) if named(each).startswith(f"{name},")]
            ax.plot([one.estimate.mean] * 2, [min(places) - 0.4, max(places) + 0.4], ":", color=INK, linewidth=1)
        ax.set_yticks(range(len(found)), [named(one) for one in found])
        ax.invert_yaxis()
        ax.set(xlabel="validation loss, nats per byte")
        ax.set_title("Loss by heads, a point a seed (orange: Mixture-of-Head)", color=INK, loc="left")
        ax.grid(color=FAINT)
        figure.savefig(OUT, dpi=110)
    print(OUT)
    for one in found:
        less = difference(one, bases[named(one).partition(",")[0]])
        values = " ".join(f"{value:.3f}" for _, value in sorted(one.values.items()))
        cost = flops(next(iter(one.runs.values())).config)
        print(
            named(one),
            values,
            f"{one.estimate.mean:.3f} +- {one.estimate.half:.3f}",
            f"{less.mean:+.3f} +- {less.half:.3f}",
            f"{cost:.3g}",
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
