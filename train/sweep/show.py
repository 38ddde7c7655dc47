"""What a sweep will take, and how it stands, as tables for people."""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from plait.configs.files import read_json
from plait.train.run_folder.contents import ENVIRONMENT
from plait.train.run_folder.lines import METRICS, read_lines
from plait.train.sweep import fronts
from plait.train.sweep.record import Sweep, read
from plait.train.sweep.runs import Run
from plait.train.sweep.table import apart, varying
from plait.train.sweep.trials import Search, trials
from plait.train.sweep.workers import claims
from plait.train.sweep.workers.claims import OVER
from plait.train.terminal.progress import format_seconds

_LIVE_SECONDS = 2.0
_NOTHING = "–"
_COLOURS = {
    "running": "cyan",
    "done": "green",
    "failed": "red",
    "stopped": "yellow",
    "pruned": "magenta",
    "interrupted": "yellow",
    "queued": "dim",
}


def space_table(search: Search) -> Table:
    """What the trials of a search draw from."""
    options, each = search.options, search.seeds or 1
    table = Table(
        title=f"{options.trials} trials of {each} run{'s' * (each > 1)}, proposed by {options.sampler} for {options.metric}"
    )
    table.add_column("key")
    table.add_column("from", overflow="fold")
    for key, one in {**search.space, **search.fixed}.items():
        table.add_row(key, str(one))
    return table


def plan_table(runs: Sequence[Run], folder: Path, presets_run: Path, width: int | None = None) -> Table:
    """Each run with its size and work, and the time that it takes where the rate is known from runs that were done here.

    Args:
        folder: of the sweep, whether it has begun or not.
        presets_run: where a run of the preset alone may lie.
        width: columns of the terminal; None for as many as the table needs.
    """
    sizes = {run.name: _size(run) for run in runs}
    work = sum(size["FLOPs"] for size in sizes.values())
    rate, source = _rate(runs, [size["FLOPs"] for size in sizes.values()], folder, presets_run)
    time_of = lambda flops: _NOTHING if rate is None else format_seconds(flops / rate)
    cells = {
        name: [*(quantity(size[key]) for key in ("parameters", "tokens", "FLOPs")), time_of(size["FLOPs"])]
        for name, size in sizes.items()
    }
    table = _table(
        f"{len(runs)} run{'s' * (len(runs) != 1)}; {source}", runs, ["parameters", "tokens", "FLOPs", "time"], cells, width
    )
    table.add_section()
    together = [quantity(sum(size["tokens"] for size in sizes.values())), quantity(work), time_of(work)]
    table.add_row("all", *[""] * (len(table.columns) - 4), *together)
    return table


def status_table(folder: Path, sweep: Sweep, width: int | None = None) -> tuple[Table, bool]:
    """How each run stands, in so many columns, and whether all are over."""
    states = {run.name: claims.status(folder, run) for run in sweep.runs}
    counted = collections.Counter(states.values())
    cells = {run.name: _standing(folder, run, states[run.name]) for run in sweep.runs}
    styles = {name: _COLOURS[state] for name, state in states.items()}
    title = f"{folder}: {tally(counted)}{_yet(folder, sweep)}"
    table = _table(title, sweep.runs, ["status", "step", "loss", "left", "host"], cells, width, styles)
    table.caption, table.caption_justify = Text("\n".join(_reasons(folder, sweep, states))) or None, "left"
    return table, all(state in OVER for state in states.values()) and not _yet(folder, sweep)


def _reasons(folder: Path, sweep: Sweep, states: Mapping[str, str]) -> list[str]:
    """Why runs failed or ended before their last step, a line for each reason."""
    told: dict[str, list[int]] = {}
    for number, run in enumerate(sweep.runs, start=1):
        found = claims.outcome(folder, run)
        if states[run.name] in ("failed", "stopped", "pruned") and found is not None and (why := found.error or found.why):
            told.setdefault(f"{states[run.name]}: {why}", []).append(number)
    return [f"run{'s' * (len(some) > 1)} {', '.join(map(str, some))} {why}" for why, some in told.items()]


def _yet(folder: Path, sweep: Sweep) -> str:
    """Of a search, how many trials are still to be proposed."""
    left = 0 if sweep.search is None else sweep.search.options.trials - len(trials(folder))
    return f"; {left} trials to be proposed" if left else ""


def tally(counted: Mapping[Any, int]) -> str:
    """How many runs stand how, in words."""
    return ", ".join(f"{counted[state]} {state}" for state in _COLOURS if counted.get(state)) or "no runs"


def watch(folder: Path, sweep: Sweep, console: Console) -> None:
    """Shows the table, on a terminal until all runs are over."""
    table, over = status_table(folder, sweep, console.width)
    if not console.is_terminal:
        console.print(table)
        return
    with Live(table, console=console, auto_refresh=False) as live:
        while not over:
            time.sleep(_LIVE_SECONDS)
            table, over = status_table(folder, read(folder) if sweep.search is not None else sweep, console.width)
            live.update(table, refresh=True)


def _table(
    title: str,
    runs: Sequence[Run],
    more: Sequence[str],
    cells: Mapping[str, Sequence[str]],
    width: int | None,
    styles: Mapping[str, str] = MappingProxyType({}),
) -> Table:
    """A line a run, by name: the keys in which runs differ, a column each or in one; then cells of `more`. One column where theirs are too
    wide, and where most of what they hold would be nothing, as of a study whose rows have options of different mixers."""
    varied = varying(tuple(runs))
    keys = list(next(iter(varied.values()), ()))
    values = {name: [_NOTHING if value is None else str(value) for value in found.values()] for name, found in varied.items()}
    every = [value for found in values.values() for value in found]
    lines = [["run", *keys, *more], *([str(n), *values[run.name], *cells[run.name]] for n, run in enumerate(runs, start=1))]
    columns = sum(max(map(cell_len, column)) + 3 for column in zip(*lines)) + 1
    if 2 * every.count(_NOTHING) > len(every) or (width is not None and columns > width):
        told = apart(runs)
        keys = ["what differs"]
        lines[1:] = [[line[0], ", ".join(told[run.name]), *cells[run.name]] for line, run in zip(lines[1:], runs)]
    table = Table(title=title)
    table.add_column("run", justify="right", no_wrap=True)
    for key in keys:
        table.add_column(key, overflow="fold")
    for name in more:
        table.add_column(name, justify="right", overflow="fold")
    for line, run in zip(lines[1:], runs):
        table.add_row(*line, style=styles.get(run.name))
    return table


def _size(run: Run) -> dict[str, float]:
    config = run.config
    return {
        "parameters": fronts.params(config),
        "tokens": config.steps * config.data.batch_size * config.data.seq_len,
        "FLOPs": fronts.flops(config),
    }


def _rate(runs: Sequence[Run], flops: Sequence[float], folder: Path, presets_run: Path) -> tuple[float | None, str]:
    """FLOPs a second with all that a run does besides, and where that is known from."""
    ended = [(work, found) for run, work in zip(runs, flops) if (found := claims.outcome(folder, run)) and found.status == "done"]
    if ended:
        return sum(work for work, _ in ended) / sum(
            found.seconds for _, found in ended
        ), f"time one by one, as the {len(ended)} done took"
    try:
        facts = read_json(presets_run / ENVIRONMENT)
        last = {name: value for _, line in read_lines(presets_run / METRICS)[0] for name, value in line.items()}
        rate = 3 * facts["flops_per_token"] * last["tokens"] / last["seconds"]
        return rate, f"time one by one, at the rate of {presets_run} ({facts['devices']['count']} x {facts['devices']['kind']})"
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None, f"no time: nothing was measured yet, neither here nor in {presets_run}"


def _standing(folder: Path, run: Run, state: str) -> list[str]:
    last, steps = claims.latest(folder, run), run.config.steps
    step, seconds, loss = last.get("step", 0), last.get("seconds", 0.0), last.get("loss/train")
    left = ""
    if state == "running":
        left = format_seconds(seconds / step * (steps - step)) if step else "starting"
    ended, record = claims.outcome(folder, run), claims.holder(folder, run)
    host = record.host if record is not None else "" if ended is None else ended.host
    return [state, f"{step:,}/{steps:,}", "" if loss is None else f"{loss:.4f}", left, host]


def quantity(value: float, _: object = None) -> str:
    """A large number, also of an axis: 20, 1.5K, 2M, 3.1T."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
