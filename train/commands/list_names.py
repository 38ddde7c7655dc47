"""`launch.py list presets|mixers|... [NAME ...]`."""

from __future__ import annotations

from collections.abc import Sequence

from plait.configs import listing
from plait.train.terminal.console import console, notes

_WIDE = 160
"""Columns from which a terminal gets every column of a wide table."""


def run(args: Sequence[str]) -> None:
    """Shows what there is of one kind, or what there is to say of some."""
    if not args or args[0] not in listing.TABLES:
        raise ValueError(f"list needs one of {', '.join(listing.TABLES)}, not {' '.join(args) or 'nothing'}")
    what, names = args[0], args[1:]
    kind = next((kind for kind in listing.KINDS if listing.registry(kind).plural == what), None)
    if names and kind is None:
        raise ValueError(
            f"list {what} takes no names, and got {' '.join(names)}; leave them out ('launch.py train NAME --help' shows a preset)"
        )
    if names and kind is not None:
        console.print(listing.component_records(kind, names))
    elif kind in listing.BRIEF and console.is_terminal and console.width < _WIDE:
        console.print(listing.component_table(kind, brief=True))
        notes.print(f"launch.py list {what} NAME ... says the rest, as a terminal of {_WIDE} columns or a file gets it")
    else:
        console.print(listing.TABLES[what]())
