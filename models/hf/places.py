"""Where a layer's parameters lie in the model: alone, or as entries of a stack."""

from __future__ import annotations

import dataclasses

from plait.models.config import LMConfig


@dataclasses.dataclass(frozen=True)
class Place:
    """An array of the model, or one entry of it."""

    path: str
    """Dotted, as in `plait.train.state.Blueprint`."""
    index: tuple[int, ...] = ()
    """Along its first axes: of a layer where layers are stacked, of an expert in a mixture."""


def layer_places(model: LMConfig) -> list[Place]:
    """Of each layer, where the block is."""
    lead, period, count = model.periods
    first = [Place(f"stack.first.{i}") for i in range(lead)]
    repeats = count if count > 1 else 0
    stacked = [Place(f"stack.periods.{i}", (row,)) for row in range(repeats) for i in range(period)]
    rest = model.num_layers - len(first) - len(stacked)
    return first + stacked + [Place(f"stack.rest.{i}") for i in range(rest)]
