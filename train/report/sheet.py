"""The style sheet of the page: light and dark, wide and narrow."""

CSS = """
:root { --ink: #1c2733; --muted: #66727f; --line: #e4e8ec; --paper: #ffffff; --page: #f6f7f9; --accent: #004488;
  --mono: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ee; --muted: #96a3b0; --line: #2c3640; --paper: #182029; --page: #10161c; --accent: #7fb2e5; }
  figure img, .strip span, .key i, .dot { filter: invert(.9) hue-rotate(180deg); }  /* light and dark change places, hues stay */
  figure img { mix-blend-mode: lighten; }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 52px; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 Inter, "Helvetica Neue", Arial, "Liberation Sans", sans-serif; }
main, header > div, nav > div { max-width: 1160px; margin: 0 auto; padding: 0 24px; }
header { background: var(--paper); padding: 34px 0 26px; }
header small { color: var(--muted); letter-spacing: .04em; }
h1 { font-size: 30px; line-height: 1.2; margin: 4px 0 18px; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 22px 0 6px; overflow-wrap: anywhere; }
nav { position: sticky; top: 0; z-index: 2; background: var(--paper); border-bottom: 1px solid var(--line); }
nav > div { white-space: nowrap; overflow-x: auto; scrollbar-width: thin; }
nav a { display: inline-block; padding: 9px 17px 9px 0; color: var(--muted); text-decoration: none; font-size: 13.5px; }
nav a:hover { color: var(--accent); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 20px 26px; margin: 20px 0; }
section:has(> details:not([open])) { padding: 9px 26px; margin: 8px 0; }
section > details { margin: 0; }
section > details > summary { color: inherit; }
section > details > summary h2 { display: inline; }
section > details > summary small, .contents small { color: var(--muted); font-size: 12.5px; }
section > details > summary small { display: block; margin: 2px 0 0 18px; }
section > details[open] > summary small { display: none; }
.contents ol { columns: 3 260px; column-gap: 30px; list-style: none; margin: 12px 0 0; padding: 0; }
.contents li { break-inside: avoid; padding: 4px 0; line-height: 1.4; }
.contents a { color: var(--accent); text-decoration: none; }
.contents small { display: block; }
p.lead { color: var(--muted); margin: 8px 0 14px; max-width: 78ch; }
dl.facts { display: grid; grid-template-columns: repeat(6, 1fr); gap: 14px 22px; margin: 0; }
dl.facts div { border-top: 2px solid var(--line); padding-top: 6px; min-width: 0; }
@media (max-width: 900px) { dl.facts { grid-template-columns: repeat(3, 1fr); } }
dl.facts dt { color: var(--muted); font-size: 12.5px; }
dl.facts dd { margin: 0; font-size: 17px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.pattern { font: 13px/1.5 var(--mono); margin: 26px 0 0; overflow-wrap: anywhere; }
.strip { display: flex; gap: 3px; margin: 8px 0 0; }
.strip span { flex: 1; height: 14px; border-radius: 3px; min-width: 2px; }
.key { color: var(--muted); font-size: 12.5px; margin: 7px 0 0; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 6px 0 0; vertical-align: baseline; }
.key span { display: inline-block; margin-right: 14px; }  /* a colour stays beside its words */
dl.story { display: grid; grid-template-columns: minmax(148px, max-content) 1fr; margin: 10px 0 0; }
dl.story dt, dl.story dd { padding: 8px 0; margin: 0; border-top: 1px solid var(--line); }
dl.story dt { color: var(--muted); padding-right: 14px; }
dl.story dd { padding-right: 10%; }
.lane { display: grid; grid-template-columns: minmax(200px, 30%) 1fr; column-gap: 14px; align-items: center; margin-top: 8px; }
.lane > span { overflow-wrap: anywhere; }
.lane .strip { margin: 0; }
figure { margin: 10px 0 0; }
figure + figure { margin-top: 26px; }
figure div { overflow-x: auto; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--muted); font-size: 13px; line-height: 1.5; margin-top: 6px; max-width: 900px; }
p.none { color: var(--muted); border-left: 3px solid var(--line); padding-left: 12px; }
.scroll { overflow: auto; max-height: 430px; margin-top: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--muted); white-space: nowrap;
  position: sticky; top: 0; background: var(--paper); }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
td small { color: var(--muted); margin-left: 8px; }
td { max-width: 360px; overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; }
table.dense { font-size: 12.5px; }
table.sorts th { cursor: pointer; }
table.sorts th[aria-sort]::after { content: " ↑"; }
table.sorts th[aria-sort="descending"]::after { content: " ↓"; }
td.n small { display: block; }
table.dense th, table.dense td { padding-right: 12px; }
table.sorts th, table.sorts td { white-space: normal; }
table.sorts td small { white-space: nowrap; }
table.sorts td:first-child { min-width: 150px; }
table.sorts th, table.sorts td.n { overflow-wrap: normal; padding-right: 10px; }
table.dense td:nth-child(2) { overflow-wrap: anywhere; min-width: 150px; }
table.sorts td:nth-child(2) { min-width: 90px; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px; }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--accent); font-size: 14px; }
pre { overflow: auto; max-height: 420px; font: 12px/1.5 var(--mono); }
.text { font: 12.5px/1.9 var(--mono);
  overflow-wrap: anywhere; white-space: pre-wrap; }
.text span { background: var(--page); border-radius: 3px; padding: 2px 1px; margin-right: 2px; }
footer { color: var(--muted); font-size: 12.5px; max-width: 1160px; margin: 0 auto; padding: 4px 24px 40px; }
@media (max-width: 640px) {
  main, header > div, nav > div { padding: 0 12px; }
  section { padding: 16px 14px; border-radius: 6px; }
  dl.facts { grid-template-columns: repeat(2, 1fr); }
  dl.story, .lane { grid-template-columns: 1fr; }
  dl.story dt { padding-bottom: 0; }
  dl.story dd { border: 0; padding: 0 0 8px; }
  .strip { gap: 1px; }
  figure img { width: 900px; }
}
@media print { nav { display: none; } section { break-inside: avoid-page; border: 0; } }
"""
