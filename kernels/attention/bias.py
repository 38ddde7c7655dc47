"""An additive bias of low rank on the logits, folded into wider queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from plait.kernels.shapes import accumulation_dtype, check_floating, check_rank

Array = jax.Array

MULTIPLE = 16
"""Folded queries and keys have a multiple of this many columns where they had one before, as the products on GPUs need."""


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
        filling = 0 if q.shape[-1] % MULTIPLE else -rank % MULTIPLE

        def join(x: Array, columns: Array) -> Array:
            columns = jnp.pad(columns.astype(x.dtype), ((0, 0), (0, 0), (0, 0), (0, filling)))
            return jnp.concatenate([x, jnp.broadcast_to(columns, (*x.shape[:3], columns.shape[3]))], axis=-1)

        return join(q, self.q.astype(accumulation_dtype(self.q)) / scale), join(k, self.k)
