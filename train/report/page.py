"""The report as one HTML page: inline style, images as data, no request to anywhere. Every string from a run is escaped here."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from plait.train.probes.docs import every_watcher
from plait.train.report.kept import SCRIPT
from plait.train.report.panels.curves import event_title
from plait.train.report.run import Run, facts
from plait.train.report.sheet import CSS
from plait.train.report.sorting import SCRIPT as SORTING
from plait.train.report.style import Picture, kind_colour, run_colour
from plait.train.report.summary import summary
from plait.train.report.variants import variants

MARK = "<title>plait "
"""Stands at the beginning of every page."""
TABLE_SORTS = 'class="dense sorts"'
MANY = 12  # sections that do without a table of contents


class Markup(str):
    """HTML that is escaped already; any other string is a sentence still to be escaped."""


@dataclass(frozen=True)
class Section:
    """A part of the page, that a click folds."""

    short: str
    """Its name where space is short."""
    title: str
    items: Sequence[Picture | str]
    """Figures, markup, and sentences."""
    holds: Sequence[str] = ()
    """What is drawn in it."""
    folded: bool = False
    """Whether it is so at first."""


def page(title: str, head: str, sections: Sequence[Section], *, made: str, reload: float | None) -> str:
    """The whole page.

    Args:
      title: begins as `MARK` does.
      made: says of what it is made.
      reload: seconds after which a browser loads it again, with what was open; 0: it is the last of such pages; None: it never was one.
    """
    links = "".join(f'<a href="#{anchor(one.short)}">{escape(one.short)}</a>' for one in sections)
    body = (_contents(sections) if len(sections) > MANY else "") + "".join(_section(one) for one in sections)
    foot = f"Written by plait {made}; the figures are also PNG files beside this page."
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>{_reload(reload) if reload else ''}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{CSS}</style></head><body>"
        f"<header><div>{head}</div></header><nav><div>{links}</div></nav><main>{body}</main><footer>{foot}</footer>"
        f"{SORTING if TABLE_SORTS in body else ''}{'' if reload is None else SCRIPT}</body></html>\n"
    )


def _reload(seconds: float) -> str:
    return f'<meta http-equiv="refresh" content="{max(1, round(seconds))}">'


def at_rest(text: str) -> str:
    """The page, no longer loaded again."""
    return re.sub(r'<meta http-equiv="refresh" content="[0-9]+">', "", text, count=1)


def _contents(sections: Sequence[Section]) -> str:
    rows = []
    for one in sections:
        held = f"<small>{escape(', '.join(one.holds))}</small>" if one.holds else ""
        rows.append(f'<li><a href="#{anchor(one.short)}">{escape(one.title)}</a>{held}</li>')
    return f'<section class="contents"><h2>Contents</h2><ol>{"".join(rows)}</ol></section>'


def _section(one: Section) -> str:
    """Its address is inside what folds: a browser that goes there unfolds it."""
    held = f"<small>{escape(', '.join(one.holds))}</small>" if one.folded and one.holds else ""
    start = f"<section><details{'' if one.folded else ' open'}><summary><h2>{escape(one.title)}</h2>{held}</summary>"
    return f'{start}<div id="{anchor(one.short)}">{"".join(map(show, one.items))}</div></details></section>'


def anchor(name: str) -> str:
    """A name that addresses and file names can hold."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def lead(text: str) -> str:
    """One introductory sentence of a section."""
    return f'<p class="lead">{escape(text)}</p>'


def show(item: Picture | str) -> str:
    """A figure with its caption, markup, or the sentence that says why there is none."""
    if isinstance(item, Markup):
        return item
    if isinstance(item, str):
        return f'<p class="none">{escape(item)}</p>'
    alt = escape(item.caption, quote=True)
    width, height = item.size
    image = f'<img src="{item.source}" alt="{alt}" width="{width}" height="{height}" loading="lazy">'
    return f"<figure><div>{image}</div><figcaption>{escape(item.caption)}</figcaption></figure>"


def heading(run: Run) -> str:
    """The name of one of several runs, in its colour."""
    return f'<h3><i class="dot" style="background:{run_colour(run.place)}"></i>{escape(run.name)}</h3>'


def header(runs: Sequence[Run]) -> str:
    """Names, facts and the layer strip of one run, or the number of runs compared."""
    if len(runs) > 1:
        return f"<small>plait training report</small><h1>{len(runs)} runs compared</h1>" + strip(runs)
    return titled("plait training report", runs[0].name, facts(runs[0])) + strip(runs)


def titled(what: str, name: str, told: dict[str, str]) -> str:
    """The name, and facts as tiles, under them the pattern."""
    pattern = told.pop("pattern")
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in told.items())
    title = f"<small>{escape(what)}</small><h1>{escape(name)}</h1>"
    return f'{title}<dl class="facts">{tiles}</dl><p class="pattern">{escape("" if pattern == "–" else pattern)}</p>'


def _lane(name: str, run: Run) -> str:
    dot = f'<i class="dot" style="background:{run_colour(run.place)}"></i>'
    return f'<div class="lane"><span>{dot}{escape(name)}</span><div class="strip">{_blocks(run)}</div></div>'


def strip(runs: Sequence[Run]) -> str:
    """The layers of each variant as a row of coloured blocks, first to last, with one key."""
    if len(runs) == 1:
        lanes = f'<div class="strip">{_blocks(runs[0])}</div>'
    else:
        lanes = "".join(_lane(one.name, one.runs[0]) for one in variants(runs))
    mixers: dict[str, dict[str, int]] = {}
    for run in runs:
        for layer in run.layers:
            counts = mixers.setdefault(layer["kind"], {})
            counts[layer["mixer"]] = counts.get(layer["mixer"], 0) + 1
    names = {
        kind: ", ".join(f"{count} × {name}" if len(runs) == 1 else name for name, count in counts.items())
        for kind, counts in mixers.items()
    }
    entry = lambda kind, text: f'<span><i style="background:{kind_colour(kind)}"></i>{escape(f"{kind}: {text}")}</span>'
    key = " ".join(entry(kind, text) for kind, text in names.items())
    return f'{lanes}<p class="key">{key}</p>'


def _blocks(run: Run) -> str:
    return "".join(_block(index, layer) for index, layer in enumerate(run.layers))


def _block(index: int, layer: dict[str, Any]) -> str:
    name = escape(f"layer {index}: {layer['mixer']}, {layer['num_heads']} heads", quote=True)
    return f'<span style="background:{kind_colour(layer["kind"])}" title="{name}"></span>'


def story(run: Run) -> str:
    """The sentences of the summary and what is missing."""
    return sentences(summary(run)) + "".join(f'<p class="none">{escape(note)}.</p>' for note in run.notes)


def sentences(told: Mapping[str, str]) -> str:
    """A line for each topic."""
    return f'<dl class="story">{"".join(f"<dt>{escape(topic)}</dt><dd>{escape(text)}</dd>" for topic, text in told.items())}</dl>'


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str | tuple[str, str]]],
    *,
    numbers: Iterable[int] = (),
    dots: Sequence[str] = (),
    style: str = "",
) -> str:
    """A table of texts, or of pairs of a text and a remark.

    Args:
      head: of each column.
      rows: as many cells as `head`.
      numbers: the right-aligned columns.
      dots: a colour before the first cell of each row.
      style: a class of the sheet.
    """
    right = set(numbers)
    top = "".join(f"<th{' class=n' if i in right else ''}>{escape(name)}</th>" for i, name in enumerate(head))
    lines = []
    for index, row in enumerate(rows):
        dot = f'<i class="dot" style="background:{dots[index]}"></i>' if dots else ""
        cells = (f"<td{' class=n' if i in right else ''}>{'' if i else dot}{_cell(cell)}</td>" for i, cell in enumerate(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table class="{style}">{body}</table></div>'


def _cell(cell: str | tuple[str, str]) -> str:
    return escape(cell) if isinstance(cell, str) else f"{escape(cell[0])}<small>{escape(cell[1])}</small>"


def events_table(runs: Sequence[Run], limit: int = 400) -> str:
    """Every event in the order of steps, at most `limit` of them."""
    rows = [
        [f"{event['step']:,}", run.name, event_title(event["kind"]), str(event.get("message", ""))]
        for run in runs
        for event in sorted(run.events, key=lambda event: event["step"])
    ]
    if not rows:
        return ""
    if len(runs) == 1:
        rows, head = [[step, kind, text] for step, _, kind, text in rows], ["step", "event", "what happened"]
    else:
        head = ["step", "run", "event", "what happened"]
    more = f'<p class="none">{len(rows) - limit} more are in events.jsonl.</p>' if len(rows) > limit else ""
    return table(head, rows[:limit], numbers=[0]) + more


def text_sample(run: Run) -> str:
    """The held-out text of the attention pictures, token by token."""
    if run.attention is None:
        return ""
    tokens = "".join(f"<span>{escape(token)}</span>" for token in run.attention.tokens)
    return f'<details><summary>The text, token by token</summary><p class="text">{tokens}</p></details>'


def definitions(runs: Sequence[Run]) -> str:
    """How each value of the runs is defined, and what it means for layers that are not softmax."""
    declared = {name: one for run in runs for name, one in run.statistics.items()}
    rows = [[one.panel.title, f"{one.meaning} ({one.unit})"] for one in declared.values() if one.panel is not None]
    rows += [[event_title(kind), text] for watcher in every_watcher() for kind, text in watcher.kinds.items()]
    rows.append(["train loss", "the mean of the last 2% of the logged training losses, in nats per token"])
    note = (
        "Linear and sparse layers are compared with softmax through their implied attention: the weights A with which the head "
        "output before norm and projection is A times v. Where these are signed or do not sum to one, entropy and sinks are "
        "taken from their absolute values divided by the row sum, so they are proxies."
    )
    return lead(note) + table(["value", "definition"], rows)


def sources(runs: Sequence[Run]) -> str:
    """The environment and config of every run, folded."""
    html = ""
    for run in runs:
        for name, tree in (("environment", run.environment), ("config", run.config)):
            text = escape(json.dumps(tree, indent=2, ensure_ascii=False))
            title = escape(f"{run.name}: {name}.json")
            html += f"<details><summary>{title}</summary><pre>{text}</pre></details>"
    return html
