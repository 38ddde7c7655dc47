"""The report as one HTML page: inline style, images as data, no request to anywhere. Every string from a run is escaped here."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from plait.train.report.curves import EVENT_TITLES
from plait.train.report.maps import HEAD_VALUES
from plait.train.report.run import Run, facts
from plait.train.report.style import KIND_COLOURS, MUTED, Picture, kind_colour, run_colour
from plait.train.report.summary import comparison, differences, mean_entropy, sink_count, summary

CSS = """
:root { --ink: #1c2733; --muted: #66727f; --line: #e4e8ec; --paper: #ffffff; --page: #f6f7f9; --accent: #004488;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ee; --muted: #96a3b0; --line: #2c3640; --paper: #182029; --page: #10161c; --accent: #7fb2e5; }
  figure img { border-radius: 6px; }
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
nav a { display: inline-block; padding: 9px 18px 9px 0; color: var(--muted); text-decoration: none; font-size: 13.5px; }
nav a:hover { color: var(--accent); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 24px 26px; margin: 20px 0; }
section > p.lead { color: var(--muted); margin: 0 0 14px; max-width: 78ch; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 14px 22px; margin: 0; }
dl.facts div { border-top: 2px solid var(--line); padding-top: 6px; min-width: 0; }
dl.facts div.wide { grid-column: span 2; }
dl.facts dt { color: var(--muted); font-size: 12.5px; }
dl.facts dd { margin: 0; font-size: 17px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.strip { display: flex; gap: 3px; margin: 22px 0 0; }
.strip span { flex: 1; height: 14px; border-radius: 3px; min-width: 2px; }
.key { color: var(--muted); font-size: 12.5px; margin: 7px 0 0; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 6px 0 14px; vertical-align: baseline; }
.key i:first-child { margin-left: 0; }
ul.story { margin: 8px 0 0; padding: 0; list-style: none; max-width: 92ch; }
ul.story li { padding: 7px 0; border-top: 1px solid var(--line); }
ul.story li:first-child { border-top: 0; }
figure { margin: 14px 0 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--muted); font-size: 13px; line-height: 1.5; margin-top: 6px; max-width: 110ch; }
p.none { color: var(--muted); border-left: 3px solid var(--line); padding-left: 12px; }
.scroll { overflow: auto; max-height: 430px; margin-top: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--muted); white-space: nowrap;
  position: sticky; top: 0; background: var(--paper); }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; }
td.nowrap { white-space: nowrap; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px; }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--accent); font-size: 14px; }
pre { overflow: auto; max-height: 420px; font: 12px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
.text { font: 12.5px/1.9 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; white-space: pre-wrap; }
.text span { background: var(--page); border-radius: 3px; padding: 2px 1px; margin-right: 2px; }
footer { color: var(--muted); font-size: 12.5px; max-width: 1160px; margin: 0 auto; padding: 4px 24px 40px; }
@media print { nav { display: none; } section { break-inside: avoid-page; border: 0; } }
"""
WIDE = ("pattern", "device")


def page(title: str, head: str, sections: Sequence[tuple[str, str]], foot: str) -> str:
    """The whole page; `sections` are (title, HTML) and become the navigation."""
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name, _ in sections)
    body = "".join(f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>{html}</section>' for name, html in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>"
        f"<header><div>{head}</div></header><nav><div>{links}</div></nav><main>{body}</main><footer>{foot}</footer></body></html>\n"
    )


def _anchor(name: str) -> str:
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


def header(runs: Sequence[Run]) -> str:
    """Names, facts and the layer strip of one run, or the number of runs compared."""
    if len(runs) > 1:
        return f"<small>plait training report</small><h1>{len(runs)} runs compared</h1>" + _names(runs)
    told = facts(runs[0])
    tiles = "".join(
        f"<div{' class=wide' if name in WIDE else ''}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in told.items()
    )
    title = f"<small>plait training report</small><h1>{escape(runs[0].name)}</h1>"
    return f'{title}<dl class="facts">{tiles}</dl>{strip(runs[0])}'


def _names(runs: Sequence[Run]) -> str:
    dots = (f'<i style="background:{run_colour(i)};border-radius:50%"></i>{escape(run.name)}' for i, run in enumerate(runs))
    return f'<p class="key">{"".join(dots)}</p>'


def strip(run: Run) -> str:
    """The layers of a run as a row of coloured blocks, first to last, with a key."""
    if not run.layers:
        return ""
    blocks = "".join(_block(i, layer) for i, layer in enumerate(run.layers))
    key = "".join(
        f'<i style="background:{KIND_COLOURS.get(kind, MUTED)}"></i>{escape(kind)}: {escape(_mixers(run, kind))}'
        for kind in run.kinds
    )
    return f'<div class="strip">{blocks}</div><p class="key">{key}</p>'


def _block(index: int, layer: dict[str, Any]) -> str:
    name = escape(f"layer {index}: {layer['mixer']}, {layer['num_heads']} heads", quote=True)
    return f'<span style="background:{kind_colour(layer["kind"])}" title="{name}"></span>'


def _mixers(run: Run, kind: str) -> str:
    names = [layer["mixer"] for layer in run.layers if layer["kind"] == kind]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


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
        told += (
            f"<details><summary>{colour}{escape(run.name)}</summary>{_sentences(summary(run))}{strip(run)}{_notes(run)}</details>"
        )
    return told


def _sentences(sentences: Iterable[str]) -> str:
    return f'<ul class="story">{"".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)}</ul>'


def _notes(run: Run) -> str:
    return "".join(f'<p class="none">{escape(note)}.</p>' for note in run.notes)


def comparison_table(runs: Sequence[Run]) -> str:
    """One line for each run: what it is, its losses, its heads at the end, its speed."""
    names = ("pattern", "parameters", "steps", "tokens", "train loss", "validation loss", "bits per byte", "speed", "wall time")
    rows = []
    for run in runs:
        told = facts(run)
        values = [told[name] for name in names]
        rows.append([run.name, *values[:7], sink_count(run), mean_entropy(run), *values[7:]])
    head = ["run", *names[:7], "sink heads", "mean entropy", *names[7:]]
    return table(head, rows, numbers=range(2, len(head)), dots=[run_colour(index) for index in range(len(runs))])


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Iterable[int] = (), dots: Sequence[str] = ()) -> str:
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
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def events_table(runs: Sequence[Run], limit: int = 400) -> str:
    """Every event in the order of steps, at most `limit` of them."""
    rows = [
        [f"{event['step']:,}", run.name, EVENT_TITLES.get(event["kind"], event["kind"]), str(event.get("message", ""))]
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


def definitions() -> str:
    """How each value is defined, and what it means for layers that are not softmax."""
    rows = [[value.title, value.meaning] for value in HEAD_VALUES]
    rows += [
        ["Massive activation", "|x| in the residual stream above 100 and above 1000 times the median |x| of the layer."],
        ["Loss spike", "A loss more than 6 robust deviations and more than 10% above the median of the last logged losses."],
    ]
    note = (
        "Linear and sparse layers are compared with softmax through their implied attention: the weights A with which the head "
        "output before norm and projection is A times v. Where these are signed or do not sum to one, entropy and sinks are taken "
        "from their absolute values divided by the row sum, so they are proxies."
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
