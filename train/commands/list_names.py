"""`launch.py list presets|mixers|...`."""

from __future__ import annotations

from collections.abc import Sequence

from plait.configs import listing
from plait.train.console import console


def run(args: Sequence[str]) -> None:
    """Shows what there is of one kind."""
    if len(args) != 1 or args[0] not in listing.TABLES:
        raise ValueError(f"list needs one of {', '.join(listing.TABLES)}, not {' '.join(args) or 'nothing'}")
    console.print(listing.TABLES[args[0]]())
