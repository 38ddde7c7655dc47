"""Low-rank adapters of dense layers, which are trained in place of the model."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from plait.configs.components import Config
from plait.configs.domains import Line, Positive, Whole
from plait.models.build import PRODUCTS, Role

TARGETS: tuple[Role, ...] = tuple(role for role in PRODUCTS if role != "embedding")
"""Roles that dense layers have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(Config):
    """Dense layers become `x W + s (x A) B`, and nothing is trained but A `[in, rank]` and B `[rank, out]`, which are float32.

    A begins uniform between -1 / sqrt(in) and 1 / sqrt(in), as in the authors' code, and B at 0, so that step 0 is the model itself.
    """

    path = "lora"

    rank: Annotated[int, Whole(1, 2**14)] | None = None
    """Rank of the adapters (LoRA, 2106.09685) that are trained in place of the model; None trains the model."""
    alpha: Positive = 16.0
    """s is alpha over the rank, or over its root."""
    scaling: Literal["lora", "rslora"] = "lora"
    """`alpha / rank` (LoRA), or `alpha / sqrt(rank)` (rsLoRA, 2312.03732), with which adapters of a high rank learn as much as low ones."""
    targets: Line = "matrix,gate"
    """Roles of the dense layers that have adapters, whatever mixer or channel mixer they are in, separated by commas: `matrix`, `gate`
    (projections to gates, decays and write strengths), `router`, `head`."""

    def check(self) -> None:
        for role in self.roles:
            if role not in TARGETS:
                raise ValueError(
                    f"targets={self.targets!r} must be roles with commas between them, and {role!r} is none; use {', '.join(TARGETS)}"
                )

    @property
    def roles(self) -> tuple[str, ...]:
        """Those of the layers that have adapters."""
        return tuple(role.strip() for role in self.targets.split(","))

    @property
    def scale(self) -> float:
        """s."""
        rank = self.rank or 1
        return self.alpha / (rank if self.scaling == "lora" else rank**0.5)
