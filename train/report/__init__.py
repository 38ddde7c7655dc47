"""The report: one self-contained page about one run or several, read from run folders only."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from plait.configs.files import write_atomically
from plait.train.report import attention, curves, maps, page
from plait.train.report.run import Run, load_runs
from plait.train.report.style import RC, Picture

MOST_MAPS = 6  # runs whose maps and pictures are shown in a comparison; curves and tables hold every run


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """The path of the new `index.html`; its figures lie beside it as PNG files.

    Args:
      runs: run folders; several are overlaid in one page.
      out: folder for the page; `report/` in the run folder, or beside the first run when there are several.
    Raises:
      ValueError: a folder is not a run, or `runs` is empty.
    """
    loaded = load_runs(runs)
    first = loaded[0].path
    out = Path(out) if out is not None else (first if len(loaded) == 1 else first.parent) / "report"
    with matplotlib.rc_context(RC):
        sections = _sections(loaded)
    html = []
    for short, title, items in sections:
        for item in items:
            if isinstance(item, Picture):
                write_atomically(out / f"{item.name}.png", item.png)
        html.append((short, title, "".join(item if isinstance(item, Markup) else page.show(item) for item in items)))
    names = ", ".join(run.name for run in loaded)
    foot = "Written by plait from the run folders alone; the figures are also PNG files beside this page."
    text = page.page(f"plait report: {names}", page.header(loaded), html, foot)
    write_atomically(out / "index.html", text)
    return out / "index.html"


class Markup(str):
    """HTML that `page` made and escaped; any other string is a sentence still to be escaped."""


def _sections(runs: list[Run]) -> list[tuple[str, str, list[Picture | Markup | str]]]:
    shown = list(enumerate(runs))[:MOST_MAPS]
    rest = f"Maps and pictures are shown for the first {MOST_MAPS} of {len(runs)} runs." if len(runs) > MOST_MAPS else None
    note: list[Picture | Markup | str] = [rest] if rest else []
    if len(runs) == 1:
        over_time = [maps.over_time("over_time", [(0, runs[0], value) for value in (maps.ENTROPY, maps.SINK)], _NO_PROBES)]
    else:
        over_time = [
            maps.over_time(f"over_time_{value.key}", [(index, run, value) for index, run in shown], _NO_PROBES)
            for value in (maps.ENTROPY, maps.SINK)
        ]
    kinds = curves.kinds(runs)
    load = maps.over_time("head_load", [(index, run, maps.LOAD) for index, run in shown], _NO_LOAD)
    pictures: list[Picture | Markup | str] = []
    for index, run in shown:
        heading = [Markup(page.heading(index, run))] if len(runs) > 1 else []
        pictures += [*heading, attention.pictures(index, run), Markup(page.text_sample(run))]
    memory: list[Picture | Markup | str] = [curves.layer_lines("linear", runs, curves.LINEAR, _NO_LINEAR)]
    if len(runs) == 1 and isinstance(memory[0], Picture):
        memory.append(maps.over_time("memory", [(0, runs[0], value) for value in (maps.HORIZON, maps.WRITE)], _NO_PROBES))
    return [
        ("Summary", "What happened", [Markup(page.story(runs))]),
        ("Loss", "Loss", [curves.loss(runs)]),
        ("Speed", "Speed and optimisation", [curves.scalars(runs)]),
        ("Attention", "Attention over training", [kinds, *(over_time if isinstance(kinds, Picture) else []), *note]),
        ("Heads", "Every head at the end", [maps.final(shown)]),
        ("Memory", "Memory of the linear layers", memory),
        ("Head load", "Mixture of heads", [load]),
        ("Extremes", "Extreme values", [curves.layer_lines("extremes", runs, curves.EXTREMES, _NO_EXTREMES)]),
        ("Pictures", "Attention pictures", pictures),
        ("Events", "Events", [curves.timeline(runs), Markup(page.events_table(runs))]),
        ("Definitions", "Definitions", [Markup(page.definitions())]),
        ("Settings", "Settings", [Markup(page.sources(runs))]),
    ]


_NO_PROBES = "No probes were written, so there is nothing to map; they come with --probe-every."
_NO_LOAD = "No head load was recorded: no layer of these runs is a mixture of heads."
_NO_LINEAR = "No decay horizon, write strength or state norm was recorded: these runs have no linear layer, or no probes."
_NO_EXTREMES = "No residual norms or logits were recorded."
