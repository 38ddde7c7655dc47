"""What an evaluation found, as tables."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from plait.train.scoring.evaluate import EARLY, LATE, Evaluation, is_part
from plait.train.terminal.console import console

COLUMNS = {"loss": ("loss (nats/token)", ".4f"), "perplexity": ("perplexity", ".2f"), "bits_per_byte": ("bits per byte", ".4f")}
"""How a result is shown, where not by its name."""


def show(found: Mapping[int, Evaluation], of: str, *, by_length: bool) -> None:
    """Prints the results of one task.

    Args:
        found: by the tokens of a row; one of them where `by_length` is False.
        of: what was evaluated.
        by_length: whether each length is a row.
    """
    every = list(found.values())
    tokens = "held-out tokens" if every[0].num_bytes is not None else f"answers of {every[0].task}"
    table = Table(title=of if by_length else f"{of}: {every[0].num_tokens:,} {tokens}")
    results = {
        size: one.named | ({} if one.repetition is None else {"repetition": one.repetition}) for size, one in found.items()
    }
    names = list(dict.fromkeys(name for one in results.values() for name in one))
    whole, parts = [name for name in names if not is_part(name)], [name for name in names if is_part(name)]
    for title in ("tokens a row", tokens) if by_length else ():
        table.add_column(title, justify="right")
    for name in whole:
        table.add_column(COLUMNS.get(name, (name.replace("_", " "),))[0], justify="right")
    for size, one in found.items():
        sizes = (f"{size:,}", f"{one.num_tokens:,}") if by_length else ()
        table.add_row(*sizes, *(_cell(results[size].get(name), name) for name in whole))
    console.print(table)
    if parts:
        rows = {name.replace("_", " "): [_cell(results[size].get(name), name) for size in found] for name in parts}
        _print(rows, found, "of", "score", by_length)
    losses = {size: {(first, last): loss for first, last, loss in one.by_position()} for size, one in found.items()}
    rows = {}
    for first, last in sorted({span for one in losses.values() for span in one}):
        label = f"{first}-{last}" if last > first else str(first)
        rows[label] = [_cell(losses[size].get((first, last)), "loss") for size in found]
    if every[0].num_bytes is not None:
        rows[f"{LATE} less {EARLY}"] = [_cell(one.in_context, "loss") for one in every]
    _print(rows, found, "positions", "loss", by_length, title="loss by position in the document")


def _print(
    rows: Mapping[str, list[str]],
    found: Mapping[int, Evaluation],
    first: str,
    second: str,
    by_length: bool,
    title: str | None = None,
) -> None:
    table = Table(title=title)
    for column in (first, *(f"{size:,}" if by_length else second for size in found)):
        table.add_column(column, justify="right")
    for label, cells in rows.items():
        table.add_row(label, *cells)
    console.print(table)


def _cell(value: float | None, name: str) -> str:
    return "–" if value is None else f"{value:{COLUMNS.get(name, ('', '.4f'))[1]}}"
