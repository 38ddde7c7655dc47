"""A kind of component for tests."""

from __future__ import annotations

import dataclasses

from plait.configs.components import Component, Registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class GadgetConfig(Component):
    """Options of a gadget."""

    size: int = 1
    """What all gadgets have."""

    def check(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1; use a positive number")


GADGETS: Registry[GadgetConfig] = Registry("gadget", "plait.tests.configs.gadgets", GadgetConfig)
