"""A gadget that holds others, in a folder that is no package of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from plait.models.mixers.base import MixerConfig
from plait.tests.configs.gadgets.base import GADGETS, GadgetConfig
from plait.tests.configs.gadgets.lever import LeverConfig

LEVER = LeverConfig()


@GADGETS.register("winch", source="Ctesibius")
@dataclasses.dataclass(frozen=True, kw_only=True)
class WinchConfig(GadgetConfig):
    """A winch."""

    main: GadgetConfig = LEVER
    exact: LeverConfig = dataclasses.field(default_factory=lambda: LeverConfig(arm=3.0))
    spare: GadgetConfig | None = None
    parts: tuple[GadgetConfig, ...] = ()
    both: tuple[GadgetConfig, MixerConfig] | None = None
    named: Mapping[str, GadgetConfig] = dataclasses.field(default_factory=dict)
    anything: Any = None
