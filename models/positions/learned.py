"""A learned vector for each position."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from plait.configs.domains import Length, Positive, Whole
from plait.kernels import Tokens
from plait.models.axes import EMBED
from plait.models.build import BuildContext
from plait.models.positions.base import Position, PositionConfig, register


@register("learned", source="GPT-2; Convolutional Sequence to Sequence Learning (1705.03122)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedConfig(PositionConfig):
    """`x_i + p_i`, a row of a learned table for each position of a document."""

    place = "input"

    max_len: Length = 1024
    """Rows: the longest document, in training and in decoding."""
    offset: Annotated[int, Whole(0, 2**10)] = 0
    """Rows of the table before that of the first position, which no token has (OPT: 2)."""
    init_std: Positive = 0.02
    """Standard deviation of the rows at the start."""

    @property
    def longest(self) -> int:
        return self.max_len

    def build(self, ctx: BuildContext, width: int, num_heads: int) -> Learned:
        self.fit_length(ctx.seq_len, "training")
        return Learned(self, ctx, width)

    def fit_length(self, length: int, what: str) -> None:
        if length > self.max_len:
            raise ValueError(
                f"max_len={self.max_len} must be at least the {length} tokens of {what}; raise it, or use fewer tokens"
            )


class Learned(Position):
    """See `LearnedConfig`."""

    def __init__(self, config: LearnedConfig, ctx: BuildContext, width: int):
        rows, self.offset = config.offset + config.max_len, config.offset
        self.table = ctx.param(jax.nn.initializers.normal(config.init_std), (rows, width), (None, EMBED))

    def add(self, x: jax.Array, at: Tokens) -> jax.Array:
        return x + jnp.take(self.table[...].astype(x.dtype), at.positions + self.offset, axis=0, mode="clip")
