"""What is known of each position of a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels import chunking

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tokens:
    """What is known of each position, int32 [B, T] or None each: a pytree, made once from a batch and handed down as `at`.

    Keys that are not the queries' own tokens, such as those of a cache, have their own, `kv_at`.
    """

    ids: Any = None
    """Entries of the vocabulary; no op reads them."""
    segment_ids: Any = None
    """Tokens of equal ids see each other; id 0 is padding. Each segment is contiguous, but for keys. None is one segment."""
    positions: Any = None
    """From 0 in each segment and rising by one a token. None derives them from the segments."""

    def placed(self, batch: int, length: int) -> Tokens:
        """The same with `segment_ids` and `positions` filled in, for [batch, length] tokens."""
        segment_ids, positions = self.segment_ids, self.positions
        if segment_ids is None:
            segment_ids = jnp.ones((batch, length), jnp.int32)
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], (batch, length))
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None, :] - replace(self, segment_ids=segment_ids).starts()
        return replace(self, segment_ids=segment_ids, positions=positions)

    def stacked(self) -> Array:
        """Segments and positions [B, ..., T] as one array [B, ..., 2, T]."""
        return jnp.stack([self.segment_ids, self.positions], axis=-2)

    def starts(self) -> Array:
        """The index [B, T] at which each token's segment begins; padding counts to the segment before it."""
        index, _ = chunking.segment_index(self.segment_ids)
        here = jnp.arange(index.shape[1], dtype=jnp.int32)[None, :]
        return jax.lax.cummax(jnp.where(jnp.diff(index, axis=1, prepend=0) != 0, here, 0), axis=1)
