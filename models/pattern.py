"""Layer patterns: which mixer each layer has.

    "gated_deltanet*3,softmax"     repeated over the layers
    "gla:softmax=6:1"              a ratio: the same as "gla*6,softmax"
    "softmax@0,5,11; gla"          softmax at these layers, gla elsewhere

A name is `[wrapper+]mixer[/label]`; labels tell apart several configs of one mixer, as in "softmax/local*5,softmax".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from plait.configs.domains import DEPTH, choices, shown

_NAME = re.compile(r"(?:[a-z0-9_]+\+)?[a-z0-9_]+(?:/[a-z0-9_]+)?")


class PatternError(ValueError):
    """A pattern that cannot be read or cannot fill the layers."""


def expand_pattern(pattern: str, num_layers: int) -> tuple[str, ...]:
    """The mixer name of each of `num_layers` layers. Raises PatternError with the part that is wrong."""
    text = pattern.replace(" ", "")
    if not text:
        raise _wrong(pattern, "is empty", "name at least one mixer")
    if "@" in text or ";" in text:
        return _indices(pattern, text, num_layers)
    period = _ratio(pattern, text) if "=" in text else _repeats(pattern, text)
    if len(period) > num_layers:
        raise _wrong(pattern, f"has {len(period)} layers", f"must fit in num_layers={num_layers}; shorten it or raise num_layers")
    return tuple(period[i % len(period)] for i in range(num_layers))


def pattern_names(pattern: str) -> tuple[str, ...]:
    """The distinct mixer names of a pattern, in order of appearance. Raises PatternError."""
    text = pattern.replace(" ", "")
    if "@" in text or ";" in text:
        names = [_name(pattern, part.partition("@")[0]) for part in text.split(";")]
    else:
        names = _ratio(pattern, text) if "=" in text else _repeats(pattern, text)
    return tuple(dict.fromkeys(names))


def split_name(name: str) -> tuple[str | None, str]:
    """`(wrapper, mixer)` of a pattern name, its label dropped."""
    wrapper, plus, mixer = name.partition("/")[0].rpartition("+")
    return (wrapper if plus else None), mixer


_LONGEST_LEAD = 8


class Periods(NamedTuple):
    """How layers repeat."""

    lead: int
    """Layers before the first unit."""
    length: int
    """Layers of a unit."""
    repeats: int
    """Units, 1 where nothing repeats; what follows them is no whole unit."""


def find_periods(layers: tuple[str, ...], *, behind_others: bool = False) -> Periods:
    """The shortest unit whose repeats leave fewer layers than its own at the end.

    Where there is none, and `behind_others`, the repeats behind a few other layers that leave the fewest to be traced one by one.
    """
    n = len(layers)
    for length in range(1, n // 2 + 1):
        count = n // length
        if layers[length : length * count] == layers[: length * (count - 1)]:
            return Periods(0, length, count)
    found = [
        Periods(lead, length, count)
        for lead in range(1, min(n, _LONGEST_LEAD + 1) if behind_others else 1)
        for length in range(1, (n - lead) // 2 + 1)
        if (count := _repeated(layers[lead:], length)) > 1
    ]
    return min(found, key=lambda one: n - one.length * (one.repeats - 1), default=Periods(0, n, 1))


def _repeated(layers: tuple[str, ...], length: int) -> int:
    """How often the first `length` layers stand one after another at the beginning."""
    count = 1
    while layers[length * count : length * (count + 1)] == layers[:length]:
        count += 1
    return count


def _repeats(pattern: str, text: str) -> list[str]:
    out: list[str] = []
    for part in text.split(","):
        name, star, times = part.partition("*")
        if star and _count(times) is None:
            raise _wrong(
                pattern,
                f"repeats {shown(name)} {shown(times)} times",
                f"needs a positive count of at most {DEPTH.most}, as in 'gla*3'",
            )
        out += [_name(pattern, name)] * (_count(times) or 0 if star else 1)
        _check_depth(pattern, len(out))
    return out


def _ratio(pattern: str, text: str) -> list[str]:
    left, _, right = text.partition("=")
    names, counts = left.split(":"), [count for text in right.split(":") if (count := _count(text)) is not None]
    if not len(names) == len(counts) == right.count(":") + 1:
        raise _wrong(
            pattern,
            "is not a ratio",
            f"needs as many positive counts as names, each at most {DEPTH.most}, as in 'gla:softmax=6:1'",
        )
    _check_depth(pattern, sum(counts))
    return [_name(pattern, name) for name, count in zip(names, counts, strict=True) for _ in range(count)]


def _count(text: str) -> int | None:
    """A number of layers; None where the text is none."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) and int(text) in DEPTH else None


def _check_depth(pattern: str, layers: int) -> None:
    if layers not in DEPTH:
        raise _wrong(pattern, f"has more than {DEPTH.most} layers", "must have that many at most; lower its counts")


def _indices(pattern: str, text: str, num_layers: int) -> tuple[str, ...]:
    layers: list[str | None] = [None] * num_layers
    rest: str | None = None
    for part in text.split(";"):
        name, at, where = part.partition("@")
        _name(pattern, name)
        if not at:
            if rest is not None:
                raise _wrong(
                    pattern,
                    f"gives both {rest!r} and {name!r} without layers",
                    "may leave only one mixer for the layers not named",
                )
            rest = name
            continue
        for index in where.split(","):
            if not re.fullmatch("[0-9]{1,9}", index) or int(index) >= num_layers:
                raise _wrong(pattern, f"puts {name!r} at layer {shown(index)}", f"needs layer numbers from 0 to {num_layers - 1}")
            if layers[int(index)] is not None:
                raise _wrong(pattern, f"gives layer {index} twice", "must name each layer once")
            layers[int(index)] = name
    filled = tuple(layer or rest for layer in layers)
    if None in filled:
        missing = choices([i for i, layer in enumerate(filled) if layer is None])
        raise _wrong(
            pattern,
            f"leaves layers {missing} of {num_layers} empty",
            "needs a mixer without '@' for the rest, as in 'softmax@0; gla'",
        )
    return filled  # type: ignore[return-value]


def _name(pattern: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise _wrong(pattern, f"has {shown(name)}", "needs names like 'gla', 'moh+softmax' or 'softmax/local'")
    return name


def _wrong(pattern: str, what: str, rule: str) -> PatternError:
    return PatternError(f"pattern={shown(pattern)} {what}; it {rule}")


def pattern_of(names: Sequence[str]) -> str:
    """The shortest pattern that gives a layer each of the names: a period, or else runs."""
    for period in range(1, len(names)):
        if all(name == names[i % period] for i, name in enumerate(names)):
            return _runs(names[:period])
    return _runs(names)


def _runs(names: Sequence[str]) -> str:
    runs: list[list[Any]] = []
    for name in names:
        if runs and runs[-1][0] == name:
            runs[-1][1] += 1
        else:
            runs.append([name, 1])
    return runs[0][0] if len(runs) == 1 else ",".join(name if count == 1 else f"{name}*{count}" for name, count in runs)
