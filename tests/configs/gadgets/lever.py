"""A gadget of plain fields."""

from __future__ import annotations

import dataclasses
from typing import Literal

from plait.tests.configs.gadgets.base import GADGETS, GadgetConfig


@GADGETS.register("lever", source="Archimedes")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LeverConfig(GadgetConfig):
    """A lever."""

    arm: float = 2.0
    wood: Literal["oak", "ash"] | None = None
    bolts: tuple[int, ...] = (1, 2)
    pair: tuple[str, bool] = ("left", True)


@GADGETS.register("long_lever", source="Archimedes")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LongLeverConfig(LeverConfig):
    """A registered component that is also a lever."""

    size: int = 9
