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

    Segment id 0 is padding, which is no token wherever it stands: it belongs to no segment, sees nothing and is not seen, gives zeros,
    and a state passes over it. A segment begins at its first token, whatever stands before that. Padding between two tokens of one
    segment takes up its place: distances and positions count it.

    Keys that are not the queries' own tokens, such as those of a cache, have their own, `kv_at`.
    """

    ids: Any = None
    """Entries of the vocabulary; no op reads them."""
    segment_ids: Any = None
    """At least 0, in any order; tokens of equal ids see each other. Each segment is contiguous, but for keys. None is one segment."""
    positions: Any = None
    """How far from its segment's first token each stands, that one at 0; of padding any. None derives them from the segments."""

    predicted: Any = None
    """bool: of which the target counts in the loss; None where no probe asks. No op reads it."""
    noise: Any = None
    """uint32, drawn anew in each training step of a model that leaves something out at random; None elsewhere. No op reads it."""

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
        """The index [B, T] of the first token of each token's segment; of padding that of the segment before it, or 0."""
        begun = chunking.running_max(self.numbered())  # the segments begun so far
        here = jnp.arange(begun.shape[1], dtype=jnp.int32)[None, :]
        return chunking.running_max(jnp.where(jnp.diff(begun, axis=1, prepend=0) != 0, here, 0))

    def numbered(self) -> Array:
        """The segment ids [B, T] renumbered from 1 in order, so that the segments of a run of tokens are an interval; padding stays 0."""
        index, real = chunking.segment_index(self.segment_ids)
        return jnp.where(real, index + 1, 0)
