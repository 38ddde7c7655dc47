"""The tiles that a kernel visits, one after the other, as one axis of its grid: no step is spent on a tile that is hidden."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels.attention.visits import SKIP, Layout

Array = jax.Array

_FLAGS = 2
_KIND = 5
"""Bits of an entry that say whether a block of the outputs begins or ends, and of what kind the tile is."""

ENTRY_BITS = 31
_NONE = (1 << ENTRY_BITS) - 1


class Step(NamedTuple):
    """A tile: scalars in a kernel."""

    major: Array
    """Which block of the kernel's outputs it adds to."""
    member: Array
    """Which head of the group."""
    minor: Array
    """Which block of the other side it reads."""
    kind: Array
    first: Array
    """It is the first of the output's block."""
    last: Array


class Steps(NamedTuple):
    """The steps of each row of the batch and each head."""

    entries: Array
    """int32 [B or 1, H or 1, L]: from the highest bits on block, head of a group, block of the other side, kind, first and last. A block of
    which no tile is visible has one step of kind SKIP; after a head's last step stand copies of it, of kind SKIP too, which move no data."""
    longest: Array
    """int32 []: the steps of the head that has most."""
    member_bits: int
    minor_bits: int

    def read(self, table: Array, b: Array, h: Array, step: Array) -> Step:
        """A step of a head; `table` are the flat entries, which may be a reference in scalar memory."""
        batch, heads, length = self.entries.shape
        entry = table[((b if batch > 1 else 0) * heads + (h if heads > 1 else 0)) * length + step]
        kind, rest = (entry >> _FLAGS) & ((1 << _KIND) - 1), entry >> (_FLAGS + _KIND)
        minor, rest = rest & ((1 << self.minor_bits) - 1), rest >> self.minor_bits
        member, major = rest & ((1 << self.member_bits) - 1), rest >> self.member_bits
        return Step(major, member, minor, kind, entry & 1, (entry >> 1) & 1)


def plan_steps(kinds: Array, most: int) -> Steps:
    """The steps of tiles of kinds [B or 1, H or 1, blocks, members, blocks of the other side], of which at most `most` are visited."""
    batch, heads, _, num_member, num_minor = kinds.shape
    member_bits, minor_bits = bits_for(num_member), bits_for(num_minor)
    major, member, minor = (jax.lax.broadcasted_iota(jnp.int32, kinds.shape, axis) for axis in (2, 3, 4))
    nothing = (kinds == SKIP).all((3, 4), keepdims=True) & (member == 0) & (minor == 0)
    entries = (((major << member_bits | member) << minor_bits | minor) << _KIND | kinds) << _FLAGS
    entries = jnp.where((kinds != SKIP) | nothing, entries, _NONE).reshape(batch, heads, -1)
    entries = jnp.sort(entries, axis=-1)[..., :most]
    block = entries >> (member_bits + minor_bits + _KIND + _FLAGS)
    changes, real = block[..., 1:] != block[..., :-1], entries != _NONE
    beyond = jnp.ones_like(changes[..., :1], shape=(batch, heads, 1))
    first, last = jnp.concatenate([beyond, changes], -1), jnp.concatenate([changes, beyond], -1)
    end = jnp.max(jnp.where(real, entries, 0), axis=-1, keepdims=True) & ~((1 << (_KIND + _FLAGS)) - 1) | SKIP
    entries = jnp.where(real, entries | first.astype(jnp.int32) | last.astype(jnp.int32) << 1, end)
    return Steps(entries, jnp.max(jnp.sum(real, axis=-1, dtype=jnp.int32)), member_bits, minor_bits)


def most_steps(layout: Layout, block_q: int, block_kv: int) -> tuple[int, int]:
    """The most steps over blocks of queries, and over blocks of keys, that a head can have."""
    visited = layout.near(block_q, block_kv) | layout.anchored(block_q, block_kv)
    rows, columns = layout.widths(block_q, block_kv)
    most = lambda n, width: int(n.clip(1, width).sum())
    return most(visited.sum(1), rows), most(visited.sum(0), columns)


def bits_for(count: int) -> int:
    """The bits that number so many."""
    return (count - 1).bit_length()


def entry_bits(num_major: int, num_member: int, num_minor: int) -> int:
    """The bits of an entry."""
    return sum(map(bits_for, (num_major, num_member, num_minor))) + _KIND + _FLAGS
