"""Queries and keys turned by their positions, so that their products see distances alone."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import numpy as np

from plait.configs.domains import Base, Number
from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.positions.base import Position, PositionConfig, register
from plait.models.positions.rope import frequencies, turn


@register("rotary", source="RoFormer (2104.09864)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig(PositionConfig):
    """Pair i of the R turned channels is rotated by the angle `position theta^(-2i / R)`."""

    place = "heads"

    theta: Base = 10_000.0
    """Base of the frequencies."""
    fraction: Annotated[float, Number(above=0, least=2**-10, most=1)] = 1.0
    """Share of a head's channels that is turned, the first ones (GPT-NeoX: 0.25)."""
    interleaved: bool = False
    """Pairs are neighbours (2i, 2i + 1), as in GPT-J, not (i, i + R / 2), as in Llama."""

    def fit(self, head_dim: int) -> None:
        if (turned := self.fraction * head_dim) % 2:
            raise ValueError(
                f"fraction={self.fraction} turns {turned:g} channels of {head_dim} and they are turned in pairs; "
                "use another, an even head dim, or positions=None for NoPE"
            )

    def build(self, ctx: BuildContext, width: int, num_heads: int) -> Rotary:
        return Rotary(self)

    def turned(self, head_dim: int) -> int:
        """Channels of a head that are turned."""
        return int(self.fraction * head_dim)

    def frequencies(self, dim: int) -> np.ndarray:
        """The angle of each pair of `dim` channels that one position adds, `[dim / 2]`."""
        return frequencies(dim, self.theta)

    @property
    def magnitude(self) -> float:
        """What turned queries and keys are multiplied by each."""
        return 1.0


class Rotary(Position):
    """See `RotaryConfig`."""

    def __init__(self, config: RotaryConfig):
        self.config = config

    def turn(self, heads: jax.Array, at: Tokens) -> jax.Array:
        return self.turn_by(heads, at, self.config.magnitude)

    def turn_by(self, heads: jax.Array, at: Tokens, factor: float = 1.0) -> jax.Array:
        """`turn`, with another factor."""
        frequency = self.config.frequencies(self.config.turned(heads.shape[-1]))
        return turn(heads, at.positions, frequency, interleaved=self.config.interleaved, factor=factor)
