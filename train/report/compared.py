"""Several runs beside each other, in tables: what sets them apart, what was set differently, and how far each ends from the first."""

import math
from collections.abc import Sequence
from html import escape

from plait.train.report.page import sentences, story, table
from plait.train.report.panels.curves import POSITIONS, SCALARS
from plait.train.report.run import Run, facts
from plait.train.report.style import run_colour
from plait.train.report.summary import columns, comparison, differences

FACTS = ("pattern", "parameters", "steps", "tokens", "train loss", "validation loss", "bits per byte", "speed", "wall time")


def stories(runs: Sequence[Run]) -> str:
    """What sets the runs apart, then each run by itself, folded."""
    told = sentences(comparison(runs))
    changed = differences(runs)
    names = [run.name for run in runs]
    if changed:
        rows = [[name, *values] for name, values in changed.items()]
        told += "<h3>Settings that differ</h3>" + table(["setting", *names], rows)
    elif all(run.config for run in runs):
        told += '<p class="none">The settings of the runs are the same.</p>'
    told += "<h3>Runs</h3>" + _runs(runs)
    if ends := _ends(runs):
        told += "<h3>Metrics at the end, and how far from the first run</h3>" + table(
            ["metric", *names], ends, numbers=range(1, 99)
        )
    for index, run in enumerate(runs):
        colour = f'<i class="dot" style="background:{run_colour(index)}"></i>'
        told += f"<details><summary>{colour}{escape(run.name)}</summary>{story(run)}</details>"
    return told


def _runs(runs: Sequence[Run]) -> str:
    """A line for each run: what it is, its losses, its heads at the end, its speed."""
    measured = columns(runs)
    head = ["run", *FACTS, *measured]
    rows = []
    for index, run in enumerate(runs):
        told = facts(run)
        rows.append([run.name, *(told[name] for name in FACTS), *(values[index] for values in measured.values())])
    return table(head, rows, numbers=range(2, len(head)), dots=[run_colour(index) for index in range(len(runs))], style="dense")


def _ends(runs: Sequence[Run]) -> list[list[str | tuple[str, str]]]:
    """The last value of each metric that two runs or more have, of each run, with its difference from the first."""
    logged = dict.fromkeys(name for run in runs for record in run.records for name in record if "/" in name)
    rows: list[list[str | tuple[str, str]]] = []
    for name in sorted(logged, key=lambda name: (not name.startswith("loss/"), name)):
        ends = [run.last(name) for run in runs]
        if name.startswith(POSITIONS) or sum(map(math.isfinite, ends)) < 2:
            continue
        title, unit = SCALARS.get(name, (name, ""))
        rows.append([f"{title}, {unit}" if unit else title, *(_beside(end, ends[0], index) for index, end in enumerate(ends))])
    return rows


def _beside(end: float, first: float, index: int) -> str | tuple[str, str]:
    if not math.isfinite(end):
        return "–"
    if not index or not math.isfinite(first):
        return f"{end:.4g}"
    return f"{end:.4g}", f"{end - first:+.2g}".replace("-", "−")
