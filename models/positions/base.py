"""What a position encoding is: a frozen config and a module, in one file, found by its registered name.

It acts in one place, and leaves the others as they are: it adds to what queries and keys are projected from, turns the heads of queries
and keys, or biases their logits.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, Literal

import jax
from flax import nnx

from plait.configs.components import Component, Registry
from plait.kernels import Bias, Tokens
from plait.models.build import BuildContext

Place = Literal["input", "heads", "logits"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionConfig(Component, abc.ABC):
    """Options of a position encoding."""

    place: ClassVar[Place]
    """Where it acts; those of the input also serve the embedding (`model.positions`)."""
    bias_rank: ClassVar[int] = 0
    """Columns that its bias adds to queries and keys in a causal pass."""

    @abc.abstractmethod
    def build(self, ctx: BuildContext, width: int, num_heads: int) -> Position:
        """The module, for an input of `width` channels and `num_heads` query heads."""

    def fit(self, head_dim: int) -> None:
        """Raises ValueError, in a message that begins with the field, where it does not fit heads of `head_dim` channels."""

    @property
    def longest(self) -> int | None:
        """The most tokens of a sequence that it can place; None where any number will do."""
        return None

    def fit_length(self, length: int, what: str) -> None:
        """Raises ValueError where it cannot place a token of a sequence of `length`, which `what` asks for."""


class Position(nnx.Module):
    """The module of a position encoding."""

    def add(self, x: jax.Array, at: Tokens) -> jax.Array:
        """`x` `[B, T, D]`, from which queries and keys are projected, with positions."""
        return x

    def turn(self, heads: jax.Array, at: Tokens) -> jax.Array:
        """Queries or keys `[B, T, H, K]` with positions."""
        return heads

    def bias(self, at: Tokens, kv_at: Tokens, *, scale: float) -> Bias | None:
        """What is added to the logits, which attention multiplies by `scale`, of queries and keys that stand at these tokens."""
        return None


POSITIONS: Registry[PositionConfig] = Registry("position", "plait.models.positions", PositionConfig)
register = POSITIONS.register
