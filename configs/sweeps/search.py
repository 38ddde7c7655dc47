"""Searches: what is drawn for each trial, and by whom, where a grid would be too large.

{"optimizer.learning_rate": Between(1e-4, 1e-1, log=True), "model.pattern[0]": Choice(("gla", "softmax")), "steps": 300}

A key with a place, as `model.pattern[2]`, is one part of a value, whose parts are joined by commas. What is no dimension is the same in all
trials; an option of a mixer, as `model.mixers.gla.num_heads`, is one of those trials whose `model.pattern` has come to name it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from plait.configs.components import Config, ConfigError
from plait.configs.domains import Name, Seed, Whole, shown
from plait.configs.sweeps.rows import Row
from plait.models.pattern import pattern_names

_RANGE = re.compile(r"(?P<low>[-+0-9.eE]+?)\.\.(?P<high>[-+0-9.eE]+?)(?P<log>:log)?")
_MIXER = re.compile(r"model\.mixers\.([^.]+)\.")
_PLACE = re.compile(r"(.+)\[(\d+)\]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig(Config):
    """Who proposes trials, how many, and what they are judged by."""

    path = "search"

    sampler: Literal["random", "tpe"] | None = None
    """`random`, or `tpe`: a tree-structured Parzen estimator, which proposes what is likelier among good trials than among others; both
    optuna's (extra `search`). None searches nothing: every combination of values is a run."""
    trials: Annotated[int, Whole(1, 100_000)] = 20
    """Proposals, each trained with every seed."""
    metric: Name = "loss/val"
    """Of the end of a run, mean over seeds: what trials are judged by."""
    better: Literal["lower", "higher"] | None = None
    """Whether less of it is better, or more; None tells by its name: less of losses and error rates."""
    seed: Seed = 0
    """Of the proposals."""


@dataclasses.dataclass(frozen=True)
class Between:
    """Numbers from `low` to `high`, whole ones where both are."""

    low: int | float
    high: int | float
    log: bool = False
    """Whether they are drawn evenly over the logarithm."""

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConfigError(f"{self.low}..{self.high} must go from a number to a larger one; give the smaller first")
        if self.log and self.low <= 0:
            raise ConfigError(f"{self.low}..{self.high}:log must be of numbers above 0; leave :log out")

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that must be usable for all to be."""
        return (self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low} to {self.high}{' by the logarithm' if self.log else ''}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that must be usable for all to be."""
        return self.values

    def __str__(self) -> str:
        return " or ".join(map(str, self.values))


Dimension = Between | Choice
Space = Mapping[str, Any]
"""By dotted key a dimension, or a value that all trials have."""


def ranges(args: Sequence[str]) -> tuple[dict[str, Between], list[str]]:
    """The options of a command line whose value is `LOW..HIGH` or `LOW..HIGH:log`, and the other words.

    Raises:
        ConfigError: a range that is none.
    """
    found: dict[str, Between] = {}
    rest: list[str] = []
    left = list(args)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if not equals and left:
            value = left[0]
        if not name.startswith("--") or (match := _RANGE.fullmatch(value)) is None:
            rest.append(word)
            continue
        if not equals:
            left.pop(0)
        key = name[2:].replace("-", "_")
        try:
            found[key] = Between(_number(match["low"]), _number(match["high"]), match["log"] is not None)
        except ValueError as error:
            raise ConfigError(f"{key}={shown(value)} is no range: {error}") from None
    return found, rest


def placed(values: Mapping[str, Any]) -> Row:
    """Values as overrides: parts of one value joined, by their places; without options of mixers that a joined pattern leaves out."""
    found: dict[str, Any] = {}
    parts: dict[str, list[tuple[int, Any]]] = {}
    for key, value in values.items():
        if match := _PLACE.fullmatch(key):
            parts.setdefault(match[1], []).append((int(match[2]), value))
        else:
            found[key] = value
    joined = {key: ",".join(str(value) for _, value in sorted(some)) for key, some in parts.items()}
    if "model.pattern" in joined:
        there = pattern_names(joined["model.pattern"])
        found = {key: value for key, value in found.items() if (mixer := _MIXER.match(key)) is None or mixer[1] in there}
    return {**found, **joined}


def probes(space: Space) -> list[Row]:
    """Overrides that show whether all of a space can be used: the first of all dimensions, and each other end of one of them."""
    dimensions = {key: one for key, one in space.items() if isinstance(one, Dimension)}
    first = {key: one.ends[0] if isinstance(one, Dimension) else one for key, one in space.items()}
    return [placed(first), *(placed({**first, key: end}) for key, one in dimensions.items() for end in one.ends[1:])]


def _number(text: str) -> int | float:
    return int(text) if re.fullmatch("[-+]?[0-9]+", text) else float(text)
