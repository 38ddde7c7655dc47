"""A learned bias for each bucket of distances."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from plait.configs.domains import Length, Whole
from plait.kernels import DistanceBias, Tokens
from plait.models.axes import HEADS
from plait.models.build import BuildContext
from plait.models.positions.base import Position, PositionConfig, register


@register("relative", source="Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (1910.10683)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativeConfig(PositionConfig):
    """`z_ij + b_h[bucket(i - j)]`: half of the buckets hold one distance each, the others widen as a logarithm up to `max_distance`.

    A bidirectional model has half of them for keys behind the query. The published stacks share one table among their layers; here each
    layer has its own.
    """

    place = "logits"

    num_buckets: Annotated[int, Whole(4, 4096)] = 32
    """Rows of the table."""
    max_distance: Length = 128
    """All from here on are one bucket."""

    def check(self) -> None:
        if self.num_buckets % 4:
            raise ValueError(
                f"num_buckets={self.num_buckets} must be a multiple of 4, to be halved by direction and by kind; "
                f"use {self.num_buckets + -self.num_buckets % 4}"
            )
        if self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                f"max_distance={self.max_distance} must be above num_buckets / 2, the distances that have a bucket each; "
                f"use {4 * self.num_buckets}"
            )

    def buckets(self, *, causal: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The distances i - j, ascending, at which another bucket begins, and the bucket below each and above the last."""
        span = np.arange(-self.max_distance - 1, self.max_distance + 2)
        found = self._bucket(span, causal)
        changes = np.flatnonzero(np.diff(found)) + 1
        return tuple(span[changes].tolist()), tuple(found[np.r_[0, changes]].tolist())

    def _bucket(self, distance: np.ndarray, causal: bool) -> np.ndarray:
        """The published rule: `distance` is that of the query from the key."""
        count, first = self.num_buckets, np.zeros_like(distance)
        if causal:
            distance = np.maximum(distance, 0)
        else:
            count //= 2
            first, distance = np.where(distance < 0, count, 0), np.abs(distance)
        exact = count // 2
        ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(self.max_distance / exact)
        wide = exact + (ratio * (count - exact)).astype(np.int64)
        return first + np.where(distance < exact, distance, np.minimum(wide, count - 1))

    def build(self, ctx: BuildContext, width: int, num_heads: int) -> Relative:
        return Relative(self, ctx, width, num_heads)


class Relative(Position):
    """See `RelativeConfig`."""

    def __init__(self, config: RelativeConfig, ctx: BuildContext, width: int, num_heads: int):
        self.edges, self.order = config.buckets(causal=ctx.causal)
        self.table = ctx.param(jax.nn.initializers.normal(width**-0.5), (config.num_buckets, num_heads), (None, HEADS))

    def bias(self, at: Tokens, kv_at: Tokens, *, scale: float) -> DistanceBias:
        table = self.table[...].astype(jnp.float32)
        return DistanceBias(table=jnp.swapaxes(table[np.asarray(self.order)], 0, 1), edges=self.edges)
