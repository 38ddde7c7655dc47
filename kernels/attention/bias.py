"""Additive biases on the logits: of low rank, folded into wider queries and keys, or by distance."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.shapes import accumulation_dtype, check_floating, check_rank, check_shape

Array = jax.Array

MULTIPLE = 16
"""Folded queries and keys have a multiple of this many columns where they had one before, as the products on GPUs need."""


def folded_columns(rank: int, key_dim: int) -> int:
    """How many columns a bias of that rank adds to queries and keys of `key_dim`."""
    return rank if key_dim % MULTIPLE else rank + -rank % MULTIPLE


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRankBias:
    """Adds q_i . k_j to the logits of query i and key j, R columns each.

    The columns join those of the queries and keys, which every implementation multiplies anyway: exact, and differentiated with them.
    An op then works on K + R columns, filled up to a multiple of 16, and `unsupported` speaks of those. In 16 bits the columns are
    rounded like q and k; a number that needs more, such as a position above 256, is given as a sum of columns.

    Source: FlashBias, arXiv 2505.12044.
    """

    q: Array
    """[B or 1, T, H or 1, R]"""
    k: Array
    """[B or 1, S, Hkv or 1, R]"""

    @classmethod
    def nearest(cls, bias: Array, rank: int) -> LowRankBias:
        """The bias of `rank` with the least squared error from `bias` [H, T, S], one for each head, by singular values.

        A bias that is a smooth function of the distance, such as a learned one, has few singular values that matter; what is lost is
        for the caller to judge. Heads have columns of their own, of the keys too: with grouped keys, give one bias [1, T, S] for all.

        Raises:
          ValueError: the shape does not fit, or the rank is above what a matrix of that shape can have.
        """
        check_rank("LowRankBias.nearest", "bias", bias, "[H, T, S]")
        if not 1 <= rank <= min(bias.shape[1:]):
            raise ValueError(f"LowRankBias.nearest: rank={rank} must be from 1 to {min(bias.shape[1:])}; use a few")
        left, values, right = jnp.linalg.svd(bias.astype(accumulation_dtype(bias)), full_matrices=False)
        root = jnp.sqrt(values[:, None, :rank])
        return cls(
            jnp.swapaxes(left[..., :rank] * root, 0, 1)[None],
            jnp.moveaxis(right[:, :rank], 2, 0)[None] * jnp.swapaxes(root, 0, 1)[None],
        )

    def folded(self, op: str, q: Array, k: Array, scale: float) -> tuple[Array, Array]:
        """q [B, T, H, K] and k [B, S, Hkv, K] with the bias among their columns, for logits that are multiplied by `scale`.

        Raises:
          ValueError: a shape or dtype does not fit, or the scale is 0.
        """
        check_floating(op, **{"bias.q": self.q, "bias.k": self.k})
        if scale == 0:
            raise ValueError(f"{op}: scale=0 leaves no way to add a bias to the logits; use a scale above 0")
        rank = self.q.shape[-1]
        for name, x, side, legend in (
            ("bias.q", self.q, q, "[B or 1, T, H or 1, R]"),
            ("bias.k", self.k, k, "[B or 1, S, Hkv or 1, R]"),
        ):
            check_rank(op, name, x, legend)
            batch, length, heads, _ = side.shape
            if x.shape[0] not in (1, batch) or x.shape[1] != length or x.shape[2] not in (1, heads) or x.shape[3] != rank:
                expected = f"({batch} or 1, {length}, {heads} or 1, {rank})"
                raise ValueError(f"{op}: {name}.shape={x.shape} must be {legend} = {expected}; reshape it or what it belongs to")
        filling = folded_columns(rank, q.shape[-1]) - rank

        def join(x: Array, columns: Array) -> Array:
            columns = jnp.pad(columns.astype(x.dtype), ((0, 0), (0, 0), (0, 0), (0, filling)))
            return jnp.concatenate([x, jnp.broadcast_to(columns, (*x.shape[:3], columns.shape[3]))], axis=-1)

        return join(q, self.q.astype(accumulation_dtype(self.q)) / scale), join(k, self.k)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DistanceBias:
    """Adds table[h, b] - slopes[h] |d| to the logits of head h, d = i - j being how far the key stands before the query in their
    document, and b how many of the `edges` are at most d.

    Of whatever rank, and exact in any dtype: it is added to the logits themselves, which `unsupported` of the kernels says they cannot.
    """

    table: Any = None
    """[H, N], or None."""
    slopes: Any = None
    """[H], or None."""
    edges: tuple[int, ...] = field(default=(), metadata={"static": True})
    """N - 1 distances, ascending: where the next column of the table begins."""

    def at(self, distance: Array) -> Array:
        """The bias [H, ...] at `distance` [...]."""
        parts = []
        if self.table is not None:
            bucket = jnp.searchsorted(jnp.asarray(self.edges, jnp.int32), distance.astype(jnp.int32), side="right")
            table = self.table.astype(accumulation_dtype(self.table))
            parts.append(jnp.take(table, bucket, axis=1, mode="clip"))
        if self.slopes is not None:
            slopes = self.slopes.astype(accumulation_dtype(self.slopes))
            parts.append(-slopes.reshape(-1, *(1,) * distance.ndim) * jnp.abs(distance)[None])
        return sum(parts[1:], parts[0])

    def check(self, op: str, num_heads: int) -> None:
        """Raises ValueError where a shape does not fit, or the edges do not ascend."""
        if self.table is None and self.slopes is None:
            raise ValueError(f"{op}: bias has neither a table nor slopes; give one of them, or bias=None")
        for name, x, shape, legend in (
            ("bias.table", self.table, (num_heads, len(self.edges) + 1), "[H, edges + 1]"),
            ("bias.slopes", self.slopes, (num_heads,), "[H]"),
        ):
            if x is not None:
                check_shape(op, name, x, shape, legend)
                check_floating(op, **{name: x})
        if any(left >= right for left, right in pairwise(self.edges)):
            raise ValueError(f"{op}: bias.edges={self.edges} must ascend; sort them, and leave out what is there twice")


Bias = LowRankBias | DistanceBias
