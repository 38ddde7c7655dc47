"""What a sweep is: a frozen config in one file, found by its registered name, that says which runs there are."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from plait.configs.components import Component, Registry
from plait.configs.domains import Name, Whole
from plait.configs.sweeps.rows import Rows
from plait.configs.sweeps.search import SearchConfig, Space
from plait.configs.sweeps.stopping import StopConfig

Seeds = Annotated[int, Whole(1, 1000)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(Component):
    """A preset and rows of overrides. Its fields are options of `launch.py sweep NAME`."""

    preset: Name = "lm_tiny"
    """What the overrides of a row are of."""
    seeds: Seeds | None = None
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""
    stop: StopConfig = StopConfig()
    search: SearchConfig = SearchConfig()

    def rows(self) -> Rows:
        """The overrides, without those of `seeds`. Where there is a `space`, they are trained beside the trials."""
        return ({},)

    def space(self) -> Space:
        """What a search draws from, by key; keys with several values or a range on the command line are added."""
        return {}


SWEEPS: Registry[SweepConfig] = Registry("sweep", "plait.configs.sweeps", SweepConfig)
