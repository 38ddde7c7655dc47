"""Domains: the values that a leaf of a config may have. They stand in its annotation and are checked before anything is made of it.

    norm_eps: Epsilon = 1e-6
    decay_fraction: Annotated[float, Number(above=0, most=1)] = 0.2

What depends on other fields is said by `check`. Bounds are what a run can mean, and keep sizes and indices in the integers of the
programs; they are no advice. Needs nothing but the standard library.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import functools
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

INT32 = 2**31 - 1
"""The largest index of a program."""
_HUGE, _TINY = 1e30, 1e-30  # both are numbers in float32, and the reciprocals of each other
COLDEST = 1e-6
_SLOWEST = 1 - 1e-6  # float32 tells it, and its powers, from 1
_SHOWN = 60  # characters of a value in a message
_CHOICES = 24
_EXAMPLES: dict[Any, Any] = {int: 1, float: 0.5, bool: False, str: "text"}
_NOT_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


class Domain(abc.ABC):
    """Which values a leaf may have."""

    @property
    @abc.abstractmethod
    def rule(self) -> str:
        """What they are, as in `must be RULE`."""

    @abc.abstractmethod
    def __contains__(self, value: object) -> bool: ...

    @abc.abstractmethod
    def near(self, value: Any) -> Any:
        """One of the domain, close to a value that is not."""


@dataclasses.dataclass(frozen=True)
class Whole(Domain):
    """Whole numbers from `least` to `most`."""

    least: int
    most: int

    @property
    def rule(self) -> str:
        return f"a whole number from {self.least} to {self.most}"

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.least <= value <= self.most

    def near(self, value: Any) -> int:
        return min(max(value, self.least), self.most) if isinstance(value, int) else self.least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Number(Domain):
    """Finite numbers between two bounds, `above` and `below` of which are left out."""

    least: float = -math.inf
    most: float = _HUGE
    above: float = -math.inf
    below: float = math.inf

    @property
    def rule(self) -> str:
        low = f"above {self.above:g}" if self.above > -math.inf else f"of at least {self.least:g}"
        low += f" ({self.least:g} or more)" if self.least > self.above > -math.inf else ""
        high = f"below {self.below:g}" if self.below <= self.most else f"at most {self.most:g}"
        return f"a finite number {low} and {high}"

    def __contains__(self, value: object) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.least <= value <= self.most and self.above < value < self.below  # type: ignore[operator]

    def near(self, value: Any) -> float:
        low, high = max(self.least, self.above), min(self.most, self.below)
        return next(number for number in (low, high, (low + high) / 2) if number in self)


@dataclasses.dataclass(frozen=True)
class Text(Domain):
    """Text that is not blank and has no control characters, line ends or other marks that are no text, in `longest` characters or less."""

    longest: int = 4096

    @property
    def rule(self) -> str:
        return f"text that is not blank, without control characters and of at most {self.longest} characters"

    def __contains__(self, value: object) -> bool:
        return isinstance(value, str) and bool(value.strip()) and len(value) <= self.longest and not _NOT_TEXT.search(value)

    def near(self, value: Any) -> str:
        return (_NOT_TEXT.sub("", value).strip()[: self.longest] if isinstance(value, str) else "") or "text"


Steps = Annotated[int, Whole(1, INT32)]
"""A number of steps, from one on."""
Counted = Annotated[int, Whole(0, INT32)]
"""A number of steps or times, none included."""
Seed = Annotated[int, Whole(0, 2**32 - 1)]
"""What random numbers begin with."""
DEPTH = Whole(1, 4096)
Depth = Annotated[int, DEPTH]
"""Layers."""
Width = Annotated[int, Whole(1, 2**20)]
"""Channels of a layer."""
Channels = Annotated[int, Whole(1, 2**16)]
"""Channels of a head."""
Heads = Annotated[int, Whole(1, 4096)]
"""Heads or groups of them."""
SomeHeads = Annotated[int, Whole(0, 4096)]
"""Heads, or none."""
Experts = Annotated[int, Whole(1, 2**16)]
"""Experts of a mixture."""
Taps = Annotated[int, Whole(1, 256)]
"""Taps of a short convolution."""
Span = Annotated[int, Whole(1, 2**30)]
"""Tokens of a window, a block or a look."""
SomeSpan = Annotated[int, Whole(0, 2**30)]
"""Tokens, or none."""
LENGTH = Whole(1, 2**24)
Length = Annotated[int, LENGTH]
"""Tokens of a row."""
Rows = Annotated[int, Whole(1, 2**20)]
"""Rows of a batch."""
SomeRows = Annotated[int, Whole(0, 2**24)]
"""Rows of data, or none."""
TrainRows = Annotated[int, Whole(1, 2**24)]
"""Rows of data."""
Vocabulary = Annotated[int, Whole(1, 2**21)]
"""Ids of tokens."""
Devices = Annotated[int, Whole(1, 2**20)]
"""Devices along an axis of the mesh, or hosts."""

Positive = Annotated[float, Number(above=0, least=_TINY)]
"""A number above 0."""
Epsilon = Annotated[float, Number(above=0, least=_TINY, most=1)]
"""What keeps a quotient finite."""
LearningRate = Annotated[float, Number(above=0, least=_TINY, most=1000)]
"""A peak learning rate."""
Coefficient = Annotated[float, Number(above=0, least=_TINY, most=1e6)]
"""The weight of a loss or of a part of a sum."""
SomeCoefficient = Annotated[float, Number(least=0, most=1e6)]
"""A weight, or none."""
Factor = Annotated[float, Number(above=0, least=2**-10, most=2**10)]
"""A width over another."""
Base = Annotated[float, Number(least=1, most=1e15)]
"""The base of a rotary embedding."""
Share = Annotated[float, Number(least=0, most=1)]
"""A share of a whole."""
Average = Annotated[float, Number(above=0, least=1e-6, most=_SLOWEST)]
"""What stays of a running average in a step, where there is one."""
Decay = Annotated[float, Number(least=0, most=_SLOWEST)]
"""What stays of a running average in a step, or nothing."""
Part = Annotated[float, Number(above=0, least=COLDEST, most=1)]
"""A share of the probability, which float32 tells from nothing."""
Temperature = Annotated[float, Number(least=0, most=1e6)]
"""What logits are divided by; 0 takes the largest, and from there to `COLDEST` there is none."""
Seconds = Annotated[float, Number(above=0, least=1e-3, most=1e7)]
"""A time to wait."""

Name = Annotated[str, Text(100)]
"""A name in one line."""
Line = Annotated[str, Text()]
"""A path or another text in one line."""


@functools.cache
def hints_of(schema: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields, domains included."""
    hints = typing.get_type_hints(schema, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def domain_of(hint: Any) -> Domain | None:
    """The domain that an annotation declares, of an optional leaf too."""
    own = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Domain)), None)
    return own or next((found for one in typing.get_args(hint) if (found := domain_of(one)) is not None), None)


def check_leaves(config: Any) -> None:
    """Raises ValueError for the first leaf of a dataclass that is not in its domain, as `FIELD=VALUE must be RULE; use FIX`."""
    schema: Any = type(config)
    defaults = {field.name: field.default for field in dataclasses.fields(schema)}
    for name, hint in hints_of(schema).items():
        domain = domain_of(hint)
        if domain is None:
            continue
        for where, value in _leaves(name, getattr(config, name)):
            if value not in domain and not (value is None and type(None) in typing.get_args(hint)):
                raise ValueError(f"{where}={shown(value)} must be {domain.rule}; {fix(hint, defaults[name], value)}")


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    items = enumerate(value) if isinstance(value, tuple) else value.items() if isinstance(value, Mapping) else None
    if items is None:
        yield name, value
    else:
        yield from (leaf for key, item in items for leaf in _leaves(f"{name}.{key}", item))


def fix(hint: Any, default: Any, value: Any) -> str:
    """What to use in place of a value that a leaf cannot have: the nearest choice, the default, or a number near it."""
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if typing.get_origin(kind) is Literal]
    named = [str(choice) for kind in kinds for choice in typing.get_args(kind)]
    if isinstance(value, str) and (near := difflib.get_close_matches(value, named, n=1)):
        return f"did you mean {near[0]!r}?"
    if default is None:
        return "use None to leave it out"
    if default in (dataclasses.MISSING, "", ()):
        domain = domain_of(hint)
        default = domain.near(value) if domain is not None else named[0] if named else _EXAMPLES.get(hint)
    return "use another" if default is None else f"use {shown(default)}"


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 4 * _SHOWN:
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def is_line(text: str) -> bool:
    """Whether a text has no control characters and line ends, so that it can stand in a line of any file."""
    return not _NOT_TEXT.search(text)


def divisors(number: int) -> list[int]:
    """What divides a number above 0, in rising order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def choices(values: Sequence[object]) -> str:
    """Values to choose from in a message, the first ones where they are many."""
    return ", ".join(map(str, values[:_CHOICES])) + (", ..." if len(values) > _CHOICES else "")
