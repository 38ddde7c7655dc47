"""The report as one HTML page: inline style, images as data, no request to anywhere. Every string from a run is escaped here."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from plait.train.probes.docs import every_watcher
from plait.train.report.curves import event_title
from plait.train.report.run import Run, facts
from plait.train.report.style import Picture, kind_colour, run_colour
from plait.train.report.summary import columns, comparison, differences, summary

CSS = """
:root { --ink: #1c2733; --muted: #66727f; --line: #e4e8ec; --paper: #ffffff; --page: #f6f7f9; --accent: #004488;
  --mono: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ee; --muted: #96a3b0; --line: #2c3640; --paper: #182029; --page: #10161c; --accent: #7fb2e5; }
  figure img { border-radius: 6px; filter: brightness(.93); }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 56px; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 Inter, "Helvetica Neue", Arial, "Liberation Sans", sans-serif; }
main, header > div, nav > div { max-width: 1160px; margin: 0 auto; padding: 0 24px; }
header { background: var(--paper); padding: 34px 0 26px; }
header small { color: var(--muted); letter-spacing: .04em; }
h1 { font-size: 30px; line-height: 1.2; margin: 4px 0 18px; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 22px 0 6px; overflow-wrap: anywhere; }
nav { position: sticky; top: 0; z-index: 2; background: var(--paper); border-bottom: 1px solid var(--line); }
nav a { display: inline-block; padding: 9px 17px 9px 0; color: var(--muted); text-decoration: none; font-size: 13.5px; }
nav a:hover { color: var(--accent); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 24px 26px; margin: 20px 0; }
section > p.lead { color: var(--muted); margin: 0 0 14px; max-width: 78ch; }
dl.facts { display: grid; grid-template-columns: repeat(6, 1fr); gap: 14px 22px; margin: 0; }
dl.facts div { border-top: 2px solid var(--line); padding-top: 6px; min-width: 0; }
@media (max-width: 900px) { dl.facts { grid-template-columns: repeat(3, 1fr); } }
dl.facts dt { color: var(--muted); font-size: 12.5px; }
dl.facts dd { margin: 0; font-size: 17px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.pattern { font: 13px/1.5 var(--mono); margin: 26px 0 0; overflow-wrap: anywhere; }
.strip { display: flex; gap: 3px; margin: 8px 0 0; }
.strip span { flex: 1; height: 14px; border-radius: 3px; min-width: 2px; }
.key { color: var(--muted); font-size: 12.5px; margin: 7px 0 0; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 6px 0 14px; vertical-align: baseline; }
.key i:first-child { margin-left: 0; }
dl.story { display: grid; grid-template-columns: 108px 1fr; margin: 10px 0 0; }
dl.story dt, dl.story dd { padding: 8px 0; margin: 0; border-top: 1px solid var(--line); }
dl.story dt { color: var(--muted); }
dl.story dd { padding-right: 10%; }
.lane { display: grid; grid-template-columns: 200px 1fr; align-items: center; margin-top: 8px; }
.lane .strip { margin: 0; }
figure { margin: 10px 0 0; }
figure + figure { margin-top: 26px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--muted); font-size: 13px; line-height: 1.5; margin-top: 6px; max-width: 900px; }
p.none { color: var(--muted); border-left: 3px solid var(--line); padding-left: 12px; }
.scroll { overflow: auto; max-height: 430px; margin-top: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--muted); white-space: nowrap;
  position: sticky; top: 0; background: var(--paper); }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
td:first-child { white-space: nowrap; }
table.dense { font-size: 12.5px; }
table.dense th, table.dense td { padding-right: 12px; }
table.dense td:nth-child(2) { overflow-wrap: anywhere; min-width: 150px; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px; }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--accent); font-size: 14px; }
pre { overflow: auto; max-height: 420px; font: 12px/1.5 var(--mono); }
.text { font: 12.5px/1.9 var(--mono);
  overflow-wrap: anywhere; white-space: pre-wrap; }
.text span { background: var(--page); border-radius: 3px; padding: 2px 1px; margin-right: 2px; }
footer { color: var(--muted); font-size: 12.5px; max-width: 1160px; margin: 0 auto; padding: 4px 24px 40px; }
@media print { nav { display: none; } section { break-inside: avoid-page; border: 0; } }
"""


def page(title: str, head: str, sections: Sequence[tuple[str, str, str]], foot: str) -> str:
    """The whole page; `sections` are (short name for the navigation, title, HTML)."""
    links = "".join(f'<a href="#{anchor(short)}">{escape(short)}</a>' for short, *_ in sections)
    body = "".join(f'<section id="{anchor(short)}"><h2>{escape(name)}</h2>{html}</section>' for short, name, html in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>"
        f"<header><div>{head}</div></header><nav><div>{links}</div></nav><main>{body}</main><footer>{foot}</footer></body></html>\n"
    )


def anchor(name: str) -> str:
    """A name that addresses and file names can hold."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def lead(text: str) -> str:
    """One introductory sentence of a section."""
    return f'<p class="lead">{escape(text)}</p>'


def show(item: Picture | str) -> str:
    """A figure with its caption, or the sentence that says why there is none."""
    if isinstance(item, str):
        return f'<p class="none">{escape(item)}</p>'
    alt = escape(item.caption, quote=True)
    return f'<figure><img src="{item.source}" alt="{alt}" loading="lazy"><figcaption>{escape(item.caption)}</figcaption></figure>'


def heading(index: int, run: Run) -> str:
    """The name of one of several runs, in its colour."""
    return f'<h3><i class="dot" style="background:{run_colour(index)}"></i>{escape(run.name)}</h3>'


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


def _lane(index: int, run: Run) -> str:
    dot = f'<i class="dot" style="background:{run_colour(index)}"></i>'
    return f'<div class="lane"><span>{dot}{escape(run.name)}</span><div class="strip">{_blocks(run)}</div></div>'


def strip(runs: Sequence[Run]) -> str:
    """The layers of each run as a row of coloured blocks, first to last, with one key."""
    if len(runs) == 1:
        lanes = f'<div class="strip">{_blocks(runs[0])}</div>'
    else:
        lanes = "".join(_lane(index, run) for index, run in enumerate(runs))
    mixers: dict[str, dict[str, int]] = {}
    for run in runs:
        for layer in run.layers:
            counts = mixers.setdefault(layer["kind"], {})
            counts[layer["mixer"]] = counts.get(layer["mixer"], 0) + 1
    names = {
        kind: ", ".join(f"{count} × {name}" if len(runs) == 1 else name for name, count in counts.items())
        for kind, counts in mixers.items()
    }
    key = "".join(f'<i style="background:{kind_colour(kind)}"></i>{escape(f"{kind}: {text}")}' for kind, text in names.items())
    return f'{lanes}<p class="key">{key}</p>'


def _blocks(run: Run) -> str:
    return "".join(_block(index, layer) for index, layer in enumerate(run.layers))


def _block(index: int, layer: dict[str, Any]) -> str:
    name = escape(f"layer {index}: {layer['mixer']}, {layer['num_heads']} heads", quote=True)
    return f'<span style="background:{kind_colour(layer["kind"])}" title="{name}"></span>'


def story(runs: Sequence[Run]) -> str:
    """The sentences of the summary and what is missing; for several runs first what sets them apart, then each run."""
    if len(runs) == 1:
        return _sentences(summary(runs[0])) + _notes(runs[0])
    told = _sentences(comparison(runs)) + comparison_table(runs)
    changed = differences(runs)
    if changed:
        rows = [[name, *values] for name, values in changed.items()]
        told += "<h3>Settings that differ</h3>" + table(["setting", *(run.name for run in runs)], rows)
    for index, run in enumerate(runs):
        colour = f'<i class="dot" style="background:{run_colour(index)}"></i>'
        told += f"<details><summary>{colour}{escape(run.name)}</summary>{_sentences(summary(run))}{_notes(run)}</details>"
    return told


def _sentences(told: Mapping[str, str]) -> str:
    return f'<dl class="story">{"".join(f"<dt>{escape(topic)}</dt><dd>{escape(text)}</dd>" for topic, text in told.items())}</dl>'


def _notes(run: Run) -> str:
    return "".join(f'<p class="none">{escape(note)}.</p>' for note in run.notes)


COMPARED = {  # heading of the comparison: name of the fact
    "pattern": "pattern",
    "params": "parameters",
    "steps": "steps",
    "tokens": "tokens",
    "train": "train loss",
    "val": "validation loss",
    "bits/byte": "bits per byte",
    "speed": "speed",
    "time": "wall time",
}


def comparison_table(runs: Sequence[Run]) -> str:
    """One line for each run: what it is, its losses, its heads at the end, its speed."""
    measured = columns(runs)
    head = ["run", *COMPARED, *measured]
    rows = []
    for index, run in enumerate(runs):
        told = facts(run)
        rows.append([run.name, *(told[name] for name in COMPARED.values()), *(values[index] for values in measured.values())])
    return table(head, rows, numbers=range(2, len(head)), dots=[run_colour(index) for index in range(len(runs))], style="dense")


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Iterable[int] = (), dots: Sequence[str] = (), style: str = ""
) -> str:
    """A table; `numbers` are the right-aligned columns, `dots` a colour before the first cell of each row."""
    right = set(numbers)
    top = "".join(f"<th{' class=n' if i in right else ''}>{escape(name)}</th>" for i, name in enumerate(head))
    lines = []
    for index, row in enumerate(rows):
        dot = f'<i class="dot" style="background:{dots[index]}"></i>' if dots else ""
        cells = (
            f"<td{' class=n' if i in right else ''}>{'' if i else dot}{escape(str(cell))}</td>" for i, cell in enumerate(row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table class="{style}">{body}</table></div>'


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
