"""Numbers in the sentences of a report."""

from __future__ import annotations

from collections.abc import Iterable


def count(number_of: int, one: str, many: str | None = None) -> str:
    """`1 head`, `2 heads`."""
    return f"{number_of} {one if number_of == 1 else many or one + 's'}"


def ranges(items: Iterable[int]) -> str:
    """Whole numbers with neighbours joined: 0, 3-7."""
    ordered = sorted(set(items))
    starts = [item for item in ordered if item - 1 not in ordered]
    ends = [item for item in ordered if item + 1 not in ordered]
    return ", ".join(f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends))
