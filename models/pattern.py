"""Layer patterns: which mixer each layer has.

    "gated_deltanet*3,softmax"     repeated over the layers
    "gla:softmax=6:1"              a ratio: the same as "gla*6,softmax"
    "softmax@0,5,11; gla"          softmax at these layers, gla elsewhere

A name is `[wrapper+]mixer[/label]`; labels tell apart several configs of one mixer, as in "softmax/local*5,softmax".
"""

from __future__ import annotations

import re

_NAME = re.compile(r"(?:[a-z0-9_]+\+)?[a-z0-9_]+(?:/[a-z0-9_]+)?")


_MOST = 100_000  # layers that a count may ask for


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


def find_period(layers: tuple[str, ...]) -> tuple[int, int]:
    """`(length, count)` of the shortest unit whose repeats leave fewer than `length` layers at the end; `(n, 1)` if none."""
    n = len(layers)
    for length in range(1, n // 2 + 1):
        count = n // length
        if all(layers[i] == layers[i % length] for i in range(length * count)):
            return length, count
    return n, 1


def _repeats(pattern: str, text: str) -> list[str]:
    out: list[str] = []
    for part in text.split(","):
        name, star, times = part.partition("*")
        if star and (not times.isdecimal() or not 0 < int(times) <= _MOST):
            raise _wrong(pattern, f"repeats {name!r} {times!r} times", "needs a positive count, as in 'gla*3'")
        out += [_name(pattern, name)] * (int(times) if star else 1)
    return out


def _ratio(pattern: str, text: str) -> list[str]:
    left, _, right = text.partition("=")
    names, counts = left.split(":"), right.split(":")
    if len(names) != len(counts) or not all(c.isdecimal() and 0 < int(c) <= _MOST for c in counts):
        raise _wrong(pattern, "is not a ratio", "needs as many positive counts as names, as in 'gla:softmax=6:1'")
    return [_name(pattern, name) for name, count in zip(names, counts, strict=True) for _ in range(int(count))]


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
            if not index.isdecimal() or int(index) >= num_layers:
                raise _wrong(pattern, f"puts {name!r} at layer {index!r}", f"needs layer numbers from 0 to {num_layers - 1}")
            if layers[int(index)] is not None:
                raise _wrong(pattern, f"gives layer {index} twice", "must name each layer once")
            layers[int(index)] = name
    filled = tuple(layer or rest for layer in layers)
    if None in filled:
        missing = ", ".join(str(i) for i, layer in enumerate(filled) if layer is None)
        raise _wrong(
            pattern,
            f"leaves layers {missing} of {num_layers} empty",
            "needs a mixer without '@' for the rest, as in 'softmax@0; gla'",
        )
    return filled  # type: ignore[return-value]


def _name(pattern: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise _wrong(pattern, f"has {name!r}", "needs names like 'gla', 'moh+softmax' or 'softmax/local'")
    return name


def _wrong(pattern: str, what: str, rule: str) -> PatternError:
    return PatternError(f"pattern={pattern!r} {what}; it {rule}")
