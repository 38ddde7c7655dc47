"""The report: one self-contained page about one run or several, read from run folders only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib

from plait.configs.files import write_atomically
from plait.train.probes.statistic import Statistic
from plait.train.report import attention, curves, maps, page, trends
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
    names = ", ".join(run.name for run in loaded)
    return write_page(out, f"plait report: {names}", page.header(loaded), sections, "from the run folders alone")


def write_page(out: Path, title: str, head: str, sections: Sequence[Section], made: str) -> Path:
    """The path of a new `index.html` of sections, with their figures beside it."""
    html = []
    for short, name, items in sections:
        for item in items:
            if isinstance(item, Picture):
                write_atomically(out / f"{item.name}.png", item.png)
        html.append((short, name, "".join(item if isinstance(item, Markup) else page.show(item) for item in items)))
    foot = f"Written by plait {made}; the figures are also PNG files beside this page."
    write_atomically(out / "index.html", page.page(title, head, html, foot))
    return out / "index.html"


class Markup(str):
    """HTML that `page` made and escaped; any other string is a sentence still to be escaped."""


Section = tuple[str, str, list[Picture | Markup | str]]
"""Its short name in the navigation, its title, and what stands in it."""


def _sections(runs: list[Run]) -> list[Section]:
    pictures: list[Picture | Markup | str] = []
    for index, run in enumerate(runs[:MOST_MAPS]):
        heading = [Markup(page.heading(index, run))] if len(runs) > 1 else []
        pictures += [*heading, attention.pictures(index, run), Markup(page.text_sample(run))]
    return [
        ("Summary", "What happened", [Markup(page.story(runs))]),
        ("Loss", "Loss", [curves.loss(runs), *filter(None, [curves.by_position(runs)])]),
        ("Speed", "Speed and optimisation", [curves.scalars(runs)]),
        *_statistics(runs),
        ("Pictures", "Attention pictures", pictures),
        ("Events", "Events", [curves.timeline(runs), Markup(page.events_table(runs))]),
        ("Definitions", "Definitions", [Markup(page.definitions(runs))]),
        ("Settings", "Settings", [Markup(page.sources(runs))]),
    ]


def _statistics(runs: list[Run]) -> Iterator[Section]:
    """A section for each that panels name and some run has values for, and every head at the end."""
    known = {name: one for run in runs for name, one in run.statistics.items() if one.panel is not None}
    there = {name: one for name, one in known.items() if any(run.by_head(name) is not None for run in runs)}
    if not there:
        yield "Probes", "Probes", ["No probe was recorded, so nothing is known of attention; they come with --probe-every."]
        return
    shown = runs[:MOST_MAPS]
    sections: dict[str, list[Statistic]] = {}
    for one in there.values():
        sections.setdefault(one.panel.section, []).append(one)
    for title, members in sections.items():
        name = page.anchor(title)
        figures = [trends.of_kinds(f"{name}-kinds", runs, members), trends.of_layers(f"{name}-layers", runs, members)]
        mapped = [one for one in members if one.panel.map and (one.panel.compared or len(runs) == 1)]
        parts = [(f"{name}-maps", mapped)] if len(runs) == 1 else [(f"{name}-{one.name}", [one]) for one in mapped]
        figures += [maps.over_time(part, [(run, one) for one in ones for run in shown]) for part, ones in parts]
        items = [figure for figure in figures if figure is not None]
        if items:
            yield title, title, items
    lost = sorted({one.panel.title.lower() for name, one in known.items() if name not in there})
    notes = [f"Not recorded, as no layer of these runs has it or no probe measured it: {', '.join(lost)}."] if lost else []
    if len(runs) > MOST_MAPS:
        notes.append(f"Maps and pictures are shown for the first {MOST_MAPS} of {len(runs)} runs.")
    heads = maps.final(shown, list(there.values()))
    yield "Heads", "Every head at the end", [*([] if heads is None else [heads]), *notes]
