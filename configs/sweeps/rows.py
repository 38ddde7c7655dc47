"""Rows of overrides, one a run, and how they are put together.

product(each("model.d_model", 32, 64), each("optimizer.learning_rate", 1e-3, 3e-3))      # 4 rows
zipped(each("seed", 0, 1), each("data.seed", 0, 1))                                      # 2 rows
chain(each("model.pattern", "softmax"), each("model.pattern", "gla*3,softmax"))          # 2 rows
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from plait.configs.command_line.words import flag

Row = Mapping[str, Any]
"""Values by the dotted key of `launch.py train`; a text is read as it would be there."""
Rows = tuple[Row, ...]


def each(key: str, *values: Any) -> Rows:
    """A row for each value."""
    return tuple({key: value} for value in values)


def product(*parts: Rows) -> Rows:
    """A row for each combination; those of the last part vary fastest. Raises ValueError where two parts have one key."""
    return tuple(_joined(rows) for rows in itertools.product(*parts))


def zipped(*parts: Rows) -> Rows:
    """The first rows of all parts joined, then the second ones. Raises ValueError where there are not as many of each."""
    if len({len(rows) for rows in parts}) > 1:
        raise ValueError(f"zipped parts have {', '.join(str(len(rows)) for rows in parts)} rows; give as many of each")
    return tuple(map(_joined, zip(*parts)))


def chain(*parts: Rows) -> Rows:
    """The rows of one part after those of another."""
    return tuple(itertools.chain(*parts))


def seeds(count: int) -> Rows:
    """Runs that differ by chance alone: parameters and data of each are drawn anew, and alike for all that they are paired with."""
    return zipped(each("seed", *range(count)), each("data.seed", *range(count)))


def replaced(rows: Rows, other: Row) -> Rows:
    """The rows with the values of `other` in place of their own or beside them; rows that are then equal count once."""
    found: list[Row] = []
    for row in ({**row, **other} for row in rows):
        if row not in found:
            found.append(row)
    return tuple(found)


def words(row: Row) -> list[str]:
    """A row as words of `launch.py train`."""
    return [word for key, value in row.items() for word in _words(key, value)]


def shown(row: Row) -> str:
    """A row in a message."""
    return ", ".join(f"{key}={value}" for key, value in row.items()) or "nothing set"


def _words(key: str, value: Any) -> Iterator[str]:
    if value is True:
        yield flag(key)
    elif value is False:
        owner, dot, name = key.rpartition(".")
        yield flag(f"{owner}{dot}no-{name}")
    else:
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        yield f"{flag(key)}={text}"


def _joined(rows: tuple[Row, ...]) -> Row:
    found: dict[str, Any] = {}
    for row in rows:
        if twice := found.keys() & row.keys():
            raise ValueError(f"{min(twice)} is in two parts of a product; give its values once")
        found |= row
    return found
