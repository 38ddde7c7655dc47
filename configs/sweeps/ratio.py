"""How many layers of a hybrid must see all tokens."""

from __future__ import annotations

import dataclasses
from typing import Literal

from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.rows import Rows, each, product


@SWEEPS.register("ratio", source="A Systematic Analysis of Hybrid Linear Attention (2507.06457)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RatioSweep(SweepConfig):
    """Loss on text by the share of full layers: none, one in eight, one in four, one in two, all of eight.

    Command: `python launch.py sweep ratio --out sweeps/ratio`. 15 runs.
    """

    seeds: Seeds | None = 3
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""
    mixer: Literal["gated_deltanet", "gla", "hgrn2", "mamba2", "lightning"] = "gated_deltanet"
    """Of the layers that do not."""

    def rows(self) -> Rows:
        patterns = (self.mixer, *(f"{self.mixer}*{n},softmax" for n in (7, 3, 1)), "softmax")
        return product(each("model.num_layers", 8), each("steps", 300), each("model.pattern", *patterns))
