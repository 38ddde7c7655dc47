"""Several runs beside each other, in tables: what sets them apart, what was set differently, and how far each ends from the first."""

import math
from collections.abc import Callable, Sequence
from html import escape

from plait.train.report.page import sentences, story, table
from plait.train.report.panels.curves import POSITIONS, SCALARS
from plait.train.report.run import Run, facts, final_loss, quantity, tokens_per_second
from plait.train.report.style import run_colour
from plait.train.report.summary import columns
from plait.train.report.variants import Variant, by_runs, difference, differing, validated, variants, verdict

FACTS = ("parameters", "steps", "tokens", "train loss", "validation loss", "bits per byte", "speed", "wall time")
MEASURED: dict[str, Callable[[Run], float]] = {
    "train loss": final_loss,
    "validation loss": lambda run: run.last("loss/val"),
    "bits per byte": lambda run: run.last("loss/bits_per_byte"),
}
"""Facts of which a variant of several seeds shows the mean and the range."""
MOST_SETTINGS = 6
"""That differ and have a column; the others are folded."""


def stories(runs: Sequence[Run]) -> str:
    """What sets the runs apart, then each run by itself, folded."""
    found = variants(runs)
    told = sentences(_sentences(runs, found))
    changed = differing(found)
    if not changed and len(found) > 1:
        told += '<p class="none">The settings of the runs are the same.</p>'
    told += "<h3>Runs</h3>" + _table(runs, found, dict(list(changed.items())[:MOST_SETTINGS]))
    if len(changed) > MOST_SETTINGS:
        rows = [[one.name, *(values[i] for values in changed.values())] for i, one in enumerate(found)]
        told += _folded(f"All {len(changed)} settings that differ", table(["run", *changed], rows))
    if ends := _ends(found):
        head = ["metric", *(one.name for one in found)]
        told += _folded("Metrics at the end, and how far from the first run", table(head, ends, numbers=range(1, 99)))
    for run in runs:
        colour = f'<i class="dot" style="background:{run_colour(run.place)}"></i>'
        told += f"<details><summary>{colour}{escape(run.name)}</summary>{story(run)}</details>"
    return told


def _folded(title: str, html: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


def _sentences(runs: Sequence[Run], found: Sequence[Variant]) -> dict[str, str]:
    """The lowest validation loss (training loss where there is none) beside the noise, and whether losses can be compared at all."""
    told = {}
    for name, words in (("loss/val", "validation loss"), ("loss/train", "training loss")):
        if text := verdict(found, name, words):
            told["Loss"] = text
            break
    if several := [one for one in found if len(one.runs) > 1]:
        told["Seeds"] = (
            f"{', '.join(one.name for one in several)}: runs that differ in seeds alone, a thin line each and their mean."
        )
    if any(math.isfinite(run.last("loss/val")) for run in runs) and (text := validated(found)):
        told["Validation"] = text
    if len({run.records[-1].get("tokens") for run in runs if run.records}) > 1:
        told["Tokens"] = "The runs did not see the same number of tokens; compare their losses at equal steps, in the curves."
    return told


def _table(runs: Sequence[Run], found: Sequence[Variant], changed: dict[str, list[str]]) -> str:
    """A line for each variant: what was set, its losses, its heads at the end, its speed; a click on a heading sorts."""
    told = {run.name: facts(run) for run in runs}
    held = {name: by_runs(found, {run: of[name] for run, of in told.items()}) for name in FACTS}
    held = {name: values for name, values in held.items() if set(values) != {"–"}}
    measured = {name: by_runs(found, dict(zip(told, values, strict=True))) for name, values in columns(runs).items()}
    rows: list[list[str | tuple[str, str]]] = []
    for i, one in enumerate(found):
        row: list[str | tuple[str, str]] = [one.name, *(values[i] for values in changed.values())]
        for name, values in held.items():
            ends = [end for run in one.runs if math.isfinite(end := MEASURED[name](run))] if name in MEASURED else []
            if name == "speed" and len(speeds := [rate for run in one.runs if math.isfinite(rate := tokens_per_second(run))]) > 1:
                row.append(quantity(sum(speeds) / len(speeds), " tok/s"))
                continue
            several = f"{min(ends):.3f} to {max(ends):.3f}" if len(ends) > 1 else ""
            row.append((f"{sum(ends) / len(ends):.3f}", several) if several else values[i])
        rows.append([*row, *(values[i] for values in measured.values())])
    last = [key.rpartition(".")[2] for key in changed]
    short = [key if last.count(end) > 1 else end for key, end in zip(changed, last)]
    head = ["run", *short, *held, *measured]
    right = range(1 + len(changed), len(head))
    return table(head, rows, numbers=right, dots=[run_colour(i) for i in range(len(found))], style="dense sorts")


def _ends(found: Sequence[Variant]) -> list[list[str | tuple[str, str]]]:
    """The last value of each metric that two variants or more have, with its difference from the first and that one's interval."""
    logged = dict.fromkeys(name for one in found for run in one.runs for record in run.records for name in record if "/" in name)
    rows: list[list[str | tuple[str, str]]] = []
    for name in sorted(logged, key=lambda name: (not name.startswith("loss/"), name)):
        if name.startswith(POSITIONS) or sum(math.isfinite(one.mean(name)) for one in found) < 2:
            continue
        title, unit = SCALARS.get(name, (name, ""))
        rows.append([f"{title}, {unit}" if unit else title, *(_beside(one, found[0], name) for one in found)])
    return rows


def _beside(one: Variant, first: Variant, metric: str) -> str | tuple[str, str]:
    end = one.mean(metric)
    if not math.isfinite(end):
        return "–"
    if one is first or not math.isfinite(first.mean(metric)):
        return f"{end:.4g}"
    change = difference(one, first, metric)
    interval = f" ±{change.half:.2g}" if math.isfinite(change.half) else ""
    return f"{end:.4g}", f"{change.mean:+.2g}{interval}".replace("-", "−")
