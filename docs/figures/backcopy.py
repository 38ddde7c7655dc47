"""Draws `docs/figures/backcopy.png` from the folder of `launch.py sweep backcopy` and prints the table of docs/reproductions.md.

python docs/figures/backcopy.py sweeps/backcopy
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from plait.data.tasks.backcopy import BackcopyTask, chain
from plait.data.tasks.draws import Draws
from plait.kernels import Tokens
from plait.train.probes.pictures import Pictures
from plait.train.report.style import FAINT, INK, PAPER, RC, RUN_COLOURS
from plait.train.run import opened
from plait.train.run_folder.probe_files import read_probes
from plait.train.sweep.record import read
from plait.train.sweep.runs import Run
from plait.train.sweep.workers import claims

OUT = Path(__file__).with_suffix(".png")
ROWS = 32
ARMS = ("softmax, Adam", "ReLU, Adam", "softmax, SGD")


def arm(run: Run) -> str:
    attention = "ReLU" if run.config.model.pattern == "relu_attention" else "softmax"
    return f"{attention}, {'SGD' if run.config.optimizer.name == 'sgd' else 'Adam'}"


def main(folder: Path) -> None:
    """Writes the figure and prints a line a run."""
    runs = [run for run in read(folder).runs if claims.status(folder, run) in claims.ENDED]
    with matplotlib.rc_context({**RC, "font.size": 9.5}):
        figure = Figure(figsize=(12.4, 3.6), facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 4)
        for run in runs:
            probes = read_probes(claims.run_folder(folder, run))
            style = {"color": RUN_COLOURS[ARMS.index(arm(run))], "linewidth": 1.3, "label": arm(run)}
            sink = probes.arrays["sink"][..., 0]
            if run.config.model.num_layers == 1:
                axes[0].plot(probes.steps, sink[:, 0, 0], **style)
                axes[2].plot(probes.steps, probes.arrays["value_drain"][:, 0, 0], **style)
            else:
                axes[1].plot(probes.steps, sink.max((1, 2)), **style)
                axes[3].plot(probes.steps, probes.arrays["residual_peak"].max(1), **style)
        titles = ("one layer: weight on <s>", "three layers: the largest", "one layer: ‖v‖ of <s>", "three layers: ‖x‖ of <s>")
        labels = ("α₁, mean over queries", "α₁, mean over queries", "over the mean of the others", "over the mean of the others")
        for ax, title, label in zip(axes, titles, labels):
            ax.set_title(title, color=INK, loc="left")
            ax.set(xlabel="step", ylabel=label, xlim=(0, None), ylim=(0, None))
            ax.grid(color=FAINT)
        axes[3].set(yscale="log", ylim=(0.5, 100), yticks=(0.5, 1, 2, 5, 10, 20, 50, 100))
        axes[3].yaxis.set_major_formatter("{x:g}")
        axes[3].yaxis.set_minor_formatter(NullFormatter())
        handles = {text: line for line, text in zip(*axes[0].get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
        figure.savefig(OUT, dpi=110)
    print(OUT)
    for run in sorted(runs, key=lambda run: (run.config.model.num_layers, ARMS.index(arm(run)), run.config.seed)):
        print(run.config.model.num_layers, arm(run), run.config.seed, told(folder, run))


def told(folder: Path, run: Run) -> dict[str, Any]:
    """Losses on rows of its own beside those of Bayes, what heads look at by the kind of query, drain and peak at the end."""
    task = run.config.data.task
    assert isinstance(task, BackcopyTask)
    trained = opened(claims.run_folder(folder, run))
    tokens, targets = task.generate(Draws(np.arange(ROWS), f"figure {run.config.seed}"), run.config.data.seq_len)
    model = trained.program.blueprint.build(trained.params, trained.buffers)
    attend = jax.jit(lambda row: [one.statistics["attention"] for one in model.hidden(Tokens(row), observer=Pictures())[1]])
    maps = np.stack(
        [np.concatenate([np.asarray(one).reshape(-1, *tokens.shape[1:] * 2) for one in attend(row[None])]) for row in tokens]
    )
    triggers = (tokens > 0) & (tokens <= task.num_triggers)
    queries = np.arange(tokens.shape[1]) >= 2
    by_layer = [round(float(maps[:, layer, :, 0][~triggers & queries].mean()), 2) for layer in range(maps.shape[1])]
    before = [
        round(float(np.diagonal(maps[:, layer], -1, 1, 2)[triggers[:, 1:] & queries[1:]].mean()), 2)
        for layer in range(maps.shape[1])
    ]
    cumulative = chain(task.num_symbols, task.num_triggers)[1]
    chances = np.diff(cumulative, axis=-1, prepend=0)
    drawn = tokens > task.num_triggers
    bayes = -np.log(chances[tokens[drawn] - 1, targets[drawn] - 1]).mean()
    logits = np.asarray(jax.jit(lambda rows: model(Tokens(rows))[0])(jnp.asarray(tokens)), np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    probes = read_probes(claims.run_folder(folder, run))
    last = {name: np.round(probes.arrays[name][-5:].mean(0).reshape(-1), 2).tolist() for name in ("value_drain", "residual_peak")}
    numbers = {"chain loss": nll[drawn].mean(), "Bayes": bayes, "copy loss": nll[triggers].mean()}
    return {
        **{name: round(float(value), 3) for name, value in numbers.items()},
        "other, on <s>": by_layer,
        "copy, before": before,
        **last,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
