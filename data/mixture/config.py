"""What a source of a mixture is, and how much of it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from plait.configs.components import Config
from plait.configs.domains import INT32, Line, Number
from plait.data.tasks.base import Task

NAME = r"[a-z0-9_]{1,40}"
"""What a source may be called: a part of the names of metrics."""
_LATER = re.compile(r"([0-9.eE+-]+)@([0-9]+)")


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Config):
    """One source of a mixture. What it leaves out is as the data's own option of that name says."""

    path = "data.sources.NAME"

    source: Line | None = None
    """As `data.source`."""
    text_field: Line | None = None
    """As `data.text_field`."""
    prompt_field: Line | None = None
    """As `data.prompt_field`."""
    task: Task | None = None
    """As `data.task`: generated rows can stand beside text. Their ids come after those of the tokenizer."""
    weight: Annotated[float, Number(least=0, most=1e12)] | None = None
    """Its part of the tokens, in proportion to the weights of the others; None, of all sources, is the number of their tokens."""
    curriculum: Line | None = None
    """Weights from later steps on, as `0.5@2000, 0@8000`; None for none."""
    max_epochs: Annotated[float, Number(above=0, least=1e-6, most=1e6)] | None = None
    """Times that its rows are read at most; what then is lacking comes from the others. None is without end."""

    def check(self) -> None:
        steps = [step for step, _ in self.later]
        if steps != sorted(set(steps)) or (steps and (steps[0] < 1 or steps[-1] > INT32)):
            raise ValueError(f"curriculum={self.curriculum!r} must have rising steps from 1 on; use 0.5@2000, 0@8000")
        if self.later and self.weight is None:
            raise ValueError(f"curriculum={self.curriculum!r} changes a weight, and weight is None; give the one from step 0 on")

    @property
    def later(self) -> list[tuple[int, float]]:
        """Steps from which on the weight is another, with that weight. Raises ValueError where they cannot be read."""
        found = []
        for word in (self.curriculum or "").split(","):
            if self.curriculum is None:
                break
            match = _LATER.fullmatch(word.strip())
            try:
                weight = float(match[1]) if match else -1.0
            except ValueError:
                weight = -1.0
            if match is None or not 0 <= weight <= 1e12:
                raise ValueError(
                    f"curriculum={self.curriculum!r} has {word.strip()!r}, which is no weight and step; use 0.5@2000, 0@8000"
                )
            found.append((int(match[2]), weight))
        return found


def with_named_sources(table: Mapping[str, SourceConfig], words: Sequence[str]) -> dict[str, SourceConfig]:
    """`table` with an entry for each source that the words of a command line name, as `--data.sources.web.weight` does."""
    named = [found[1].replace("-", "_") for word in words if (found := re.match(r"--data\.sources\.([^.=]+)\.", word))]
    return {**table, **{name: SourceConfig() for name in dict.fromkeys(named) if name not in table}}


def check_sources(sources: Mapping[str, SourceConfig]) -> None:
    """Raises ValueError, in a message that begins with the field, where names or weights do not go together."""
    for name in sources:
        if not re.fullmatch(NAME, name):
            raise ValueError(f"sources has the name {name!r}, which must be letters a to z, digits and _; use another")
    given = [name for name, one in sources.items() if one.weight is not None]
    if given and len(given) < len(sources):
        without = next(name for name in sources if name not in given)
        raise ValueError(
            f"sources.{without}.weight=None is the number of its tokens, and sources.{given[0]} has a weight of another measure; "
            "give weights to all sources, or to none"
        )
    for step in sorted({0, *(step for one in sources.values() for step, _ in one.later)}):
        weights = [([one.weight, *(weight for first, weight in one.later if first <= step)])[-1] for one in sources.values()]
        if given and not any(weights):
            raise ValueError(f"sources have weights that sum to nothing from step {step} on; give one above 0")
