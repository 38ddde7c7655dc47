"""The keys that each query selects, as blocks of its document."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Array = jax.Array

MAX_BITS = 32
"""Blocks of one tile of keys that a kernel can tell apart."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SelectedBlocks:
    """Which blocks of keys each query sees, intersected with the mask.

    Blocks are counted from the start of the query's segment, so a document selects the same wherever it stands: alone, packed, after
    padding, or in a cache.
    """

    indices: Array
    """int32 [B, T, Hs, N]: numbers of blocks in any order, none twice, -1 where there is none; Hs divides H, and head h reads entry
    h // (H / Hs)."""
    block_size: int = dataclasses.field(metadata={"static": True})
    """Tokens a block; 1 selects tokens."""
    num_blocks: int = dataclasses.field(metadata={"static": True})
    """Blocks that the longest segment may have; larger numbers select nothing."""
    starts: Array | None = None
    """int32 [B, T]: at which key each query's segment begins, perhaps before the first, where keys are not the queries' own tokens and that
    is known; of padding anything. None leaves it to be found."""

    def shown(self, positions: Array) -> Array:
        """bool [B, Hs, T, S] for keys at `positions` [B or 1, S] of the query's own segment."""
        member = jnp.swapaxes(self._members(), 1, 2)
        block = jnp.clip(positions // self.block_size, 0, self.num_blocks)
        return jnp.take_along_axis(member, block[:, None, None, :], axis=3)

    def shows(self, position: int) -> Array:
        """bool [B, T, Hs]: whether each query sees the token at one position of its segment."""
        return jnp.any(self.indices == position // self.block_size, axis=-1)

    def _members(self) -> Array:
        """bool [B, T, Hs, num_blocks + 1], the last always False."""
        known = (self.indices >= 0) & (self.indices < self.num_blocks)
        nothing = jnp.zeros((*self.indices.shape[:3], self.num_blocks + 1), bool)
        index = jnp.where(known, self.indices, self.num_blocks)
        chosen = jnp.put_along_axis(nothing, index, True, axis=-1, inplace=False)
        return chosen.at[..., self.num_blocks].set(False)

    def tiles(self, starts: Array, block_q: int, block_kv: int, count: int) -> Array:
        """bool [B, Hs, T / block_q, count]: tiles of keys that a tile of queries sees some of, where keys stand in order.

        Args:
          starts: int32 [B or 1, T], the index of the key with which each query's segment begins.
        """
        first = starts[:, :, None, None] + self.indices * self.block_size
        low, high = first // block_kv, (first + self.block_size - 1) // block_kv
        at = jnp.arange(count).reshape(1, 1, 1, 1, count)
        seen = (self.indices >= 0)[..., None] & (low[..., None] <= at) & (at <= high[..., None])  # [B, T, Hs, N, count]
        return jnp.swapaxes(seen.any(3).reshape(seen.shape[0], -1, block_q, seen.shape[2], count).any(2), 1, 2)

    def bits(self, starts: Array, tile: int, count: int) -> Array:
        """int32 [B, Hs, count, T]: of each tile of keys a bit for every block that the query's segment has there, the first lowest.

        A key at index c of its tile and at position p is in block `p // block_size - max(p - c, 0) // block_size` of them.
        """
        first = (
            jnp.maximum(jnp.arange(count)[None, :, None] * tile - starts[:, None, :], 0) // self.block_size
        )  # [B or 1, count, T]
        indices = jnp.moveaxis(self.indices, 1, 2)[:, :, None]  # [B, Hs, 1, T, N]
        number = indices - first[:, None, :, :, None]
        known = (indices >= 0) & (number >= 0) & (number < MAX_BITS)
        word = jnp.where(known, jnp.left_shift(jnp.int32(1), jnp.where(known, number, 0)), 0)
        return jnp.bitwise_or.reduce(word, axis=-1)

    def unfit(self, tile: int) -> str | None:
        """Why a kernel with tiles of so many keys cannot read the bits, or None."""
        if tile // self.block_size + 2 > MAX_BITS:
            return f"selected.block_size={self.block_size} puts more than {MAX_BITS} blocks into a tile of {tile} keys"
        return None
