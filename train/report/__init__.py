"""The report: one self-contained page about one run or several, read from run folders only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib

from plait.configs.files import write_atomically
from plait.train.probes.statistic import Statistic
from plait.train.report import compared, page
from plait.train.report.page import Markup, Section
from plait.train.report.panels import attention, curves, differences, maps, sources, trends
from plait.train.report.run import Run, load_runs
from plait.train.report.style import RC, Picture
from plait.train.report.variants import by_variant, whose

PAGE = "index.html"
MOST_MAPS = 6  # runs whose maps and pictures are shown in a comparison; curves and tables hold every run
MOST_OPEN = 8  # sections of statistics that are not folded at first; where there are more, all of them are


def write_report(runs: Sequence[Path], out: Path | None = None, *, reload: float | None = None) -> Path:
    """The path of the new `index.html`; its figures lie beside it as PNG files.

    Args:
      runs: run folders; several are overlaid in one page.
      out: folder for the page; `report/` in the run folder, or beside the first run when there are several.
      reload: as for `page.page`.
    Raises:
      ValueError: a folder is not a run, `runs` is empty, or `out` holds files that are of no report.
    """
    loaded = by_variant(load_runs(runs))
    first = loaded[0].path
    out = Path(out) if out is not None else (first if len(loaded) == 1 else first.parent) / "report"
    check_page(out)
    with matplotlib.rc_context(RC):
        sections = list(_sections(loaded))
    title = f"plait report: {', '.join(run.name for run in loaded)}"
    return write_page(out, title, page.header(loaded), sections, "from the run folders alone", reload=reload)


def write_page(out: Path, title: str, head: str, sections: Sequence[Section], made: str, *, reload: float | None = None) -> Path:
    """The path of a new page of sections, with their figures beside it. Raises ValueError where files of others would be lost."""
    pictures = {f"{item.name}.png": item.png for section in sections for item in section.items if isinstance(item, Picture)}
    if not (out / PAGE).exists() and (there := [name for name in pictures if (out / name).exists()]):
        raise ValueError(f"{out} holds {', '.join(there)} and no report, so these would be lost; use another --out")
    text = page.page(title, head, sections, made=made, reload=reload)
    write_atomically(out / PAGE, text)
    for name, png in pictures.items():
        write_atomically(out / name, png)
    return out / PAGE


def check_page(out: Path) -> None:
    """Raises ValueError where a page in `out` would take the place of something that is no report."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder as --out")
    there = out / PAGE
    if not there.exists():
        return
    with there.open("rb") as file:
        ours = page.MARK.encode() in file.read(1000)
    if not ours:
        raise ValueError(f"{there} is a page, and not one of plait's; use another --out, or move it away")


def _sections(runs: list[Run]) -> Iterator[Section]:
    several = len(runs) > 1
    yield Section("Summary", "What happened", [Markup(compared.stories(runs) if several else page.story(runs[0]))])
    yield Section("Loss", "Loss", [curves.loss(runs), *filter(None, [curves.by_position(runs)])])
    yield Section("Speed", "Speed and optimisation", [curves.scalars(runs)])
    yield from _statistics(runs)
    pictures: list[Picture | str] = []
    for index, run in enumerate(runs[:MOST_MAPS]):
        heading = [Markup(page.heading(run))] if several else []
        pictures += [*heading, attention.pictures(index, run), Markup(page.text_sample(run))]
    yield Section("Pictures", "Attention pictures", pictures, folded=several)
    yield Section("Events", "Events", [curves.timeline(runs), Markup(page.events_table(runs))], folded=several)
    yield Section("Definitions", "Definitions", [Markup(page.definitions(runs))], folded=True)
    yield Section("Settings", "Settings", [Markup(page.sources(runs))], folded=several)


def _statistics(runs: list[Run]) -> Iterator[Section]:
    """A section for each that panels name and some run has values for, and every head at the end."""
    known = {name: one for run in runs for name, one in run.statistics.items() if one.panel is not None}
    there = {name: one for name, one in known.items() if any(run.by_head(name) is not None for run in runs)}
    if not there:
        yield Section(
            "Probes", "Probes", ["No probe was recorded, so nothing is known of attention; they come with --probe-every."]
        )
        return
    shown = runs[:MOST_MAPS]
    sections: dict[str, list[Statistic]] = {}
    for one in there.values():
        sections.setdefault(one.panel.section, []).append(one)
    many = len(sections) > MOST_OPEN or len(runs) > 1
    for title, members in sections.items():
        name = page.anchor(title)
        holds = [one.panel.title for one in members]
        split, plain = [one for one in members if one.by_source], [one for one in members if not one.by_source]
        figures = [sources.over_time(f"{name}-sources", runs, split)]
        figures += [sources.at_the_end(f"{name}-{one.name}", shown, one) for one in split]
        figures += [trends.of_kinds(f"{name}-kinds", runs, plain), trends.of_layers(f"{name}-layers", runs, plain)]
        mapped = [one for one in plain if one.panel.map and (one.panel.compared or len(runs) == 1)]
        parts = [(f"{name}-maps", mapped)] if len(runs) == 1 else [(f"{name}-{one.name}", [one]) for one in mapped]
        figures += [maps.over_time(part, [(run, one) for one in ones for run in shown]) for part, ones in parts]
        items: list[Picture | str] = [figure for figure in figures if figure is not None]
        if items:
            yield Section(title, title, items, holds, folded=many)
    lost = sorted({one.panel.title.lower() for name, one in known.items() if name not in there})
    notes = [f"Not recorded, as no layer of these runs has it or no probe measured it: {'; '.join(lost)}."] if lost else []
    if len(runs) > MOST_MAPS:
        notes.append(f"Maps and pictures are shown for the first {MOST_MAPS} of {len(runs)} runs.")
    whole = [one for one in there.values() if not one.by_source]
    heads = maps.final(shown, whole)
    yield Section("At the end", "Every head at the end", [*([] if heads is None else [heads]), *notes], folded=many)
    if len(shown) > 1 and (figure := differences.of_heads(shown, whole)) is not None:
        yield Section("Differences", f"Every head at the end, less that of {whose(shown[0], runs)}", [figure], folded=many)
