"""Which tiles of the attention matrix a kernel visits: a table for the grid, so that hidden tiles are never loaded."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels.attention.call import AttentionCall
from plait.kernels.masks import Mask, SelectedBlocks, Span
from plait.kernels.tokens import Tokens

Array = jax.Array

SKIP, MASKED, FULL = 0, 1, 2
"""Kinds of tile: not computed, computed under the mask, computed without looking at the mask."""

_FAR = 1 << 29


class Visits(NamedTuple):
    """The tiles that each block of one side visits on the other side, in order."""

    entries: Array
    """int32 [B or 1, H or 1, N, W]: 4 * block + kind. After a row's last tile, its block again with kind SKIP, which moves no data."""

    def flat(self) -> Array:
        """One axis, as scalar memory wants it; `lookup` reads it."""
        return self.entries.reshape(-1)

    def counts(self) -> Array:
        """int32 [B or 1, H or 1, N]: tiles visited."""
        return jnp.sum((self.entries & 3) != SKIP, axis=-1, dtype=jnp.int32)

    def lookup(self, flat: Array, b: Array, h: Array, i: Array, step: Array) -> tuple[Array, Array]:
        """(block, kind) of a step of block i in batch row b and query head h; `flat` may be a reference in scalar memory."""
        batch, heads, blocks, width = self.entries.shape
        row = (b if batch > 1 else 0) * heads + (h if heads > 1 else 0)
        entry = flat[(row * blocks + i) * width + step]
        return entry >> 2, entry & 3


class Layout(NamedTuple):
    """What is known of the two sides before the tokens are."""

    mask: Mask
    num_queries: int
    num_keys: int
    own_keys: bool
    """The keys are the queries' own tokens, in order."""
    packed: bool
    """Tokens are given: there may be several segments."""

    def near(self, block_q: int, block_kv: int) -> np.ndarray:
        """bool [NQ, NK]: tiles that the mask can show by order alone, sink tokens aside."""
        q, k = (_indices(n, block) for n, block in ((self.num_queries, block_q), (self.num_keys, block_kv)))
        if not self.own_keys:
            return np.ones((len(q.low), len(k.low)), bool)
        some, _ = self.by_order(Span(q.low[:, None], q.high[:, None]), Span(k.low[None, :], k.high[None, :]))
        return np.broadcast_to(some, (len(q.low), len(k.low)))

    def by_order(self, q: Span, k: Span) -> tuple[np.ndarray, np.ndarray]:
        """Whether the mask can show some, and shows every, key at indices `k` to queries at indices `q`, where the keys are the queries'
        own tokens: sink tokens aside, and of one segment."""
        mask = self.mask.without_sinks()
        slack = mask.alignment - 1 if self.packed else 0  # a segment may start anywhere in a block of positions
        return mask.tile(q, Span(k.low - slack, k.high + slack))

    def anchored(self, block_q: int, block_kv: int) -> np.ndarray:
        """bool [NQ, NK]: tiles that may also be visible for the sake of sink tokens."""
        near = self.near(block_q, block_kv)
        if not (self.own_keys and self.mask.num_sink_tokens):
            return np.zeros_like(near)
        starts = np.arange(near.shape[1])[None, :] * block_kv
        return (starts < np.arange(1, near.shape[0] + 1)[:, None] * block_q) & (
            self.packed | (starts < self.mask.num_sink_tokens)
        )

    def widths(self, block_q: int, block_kv: int) -> tuple[int, int]:
        """The most key blocks a query block visits, and the most query blocks a key block is visited by."""
        near = self.near(block_q, block_kv)
        either = near | self.anchored(block_q, block_kv)
        rows, columns = either.sum(1).max(), either.sum(0).max()
        if self.packed and self.own_keys and self.mask.num_sink_tokens and self.mask.reach_back() is not None:
            # Only the segment of a block's first query can begin before the block's key range.
            rows = min(rows, near.sum(1).max() + (self.mask.num_sink_tokens - 1) // block_kv + 2)
        return int(rows), int(columns)

    def expected(self, block_q: int, block_kv: int) -> int:
        """Tiles that order can show some of. Where keys are not the queries' own it is an upper bound by what the mask reaches back, or for a
        causal mask that reaches all the mean of queries that stand anywhere among the keys, as those of devices that share a row do."""
        near = self.near(block_q, block_kv)
        if self.own_keys:
            return int(near.sum())
        (rows, row), reach = near.shape, self.mask.reach_back()
        if reach is not None:
            return rows * min(row, 1 + -(-(reach + block_q) // block_kv))
        return rows * (row + 1) // 2 if self.mask.causal else rows * row


def laid_out(call: AttentionCall) -> tuple[Layout, Tokens, Tokens]:
    """The layout of a call and the tokens of its queries and keys, [B, T] and [B, S]; one row of them where nothing is packed."""
    queries, keys = call.sides
    if call.own_keys:
        queries = keys = replace(queries, segment_ids=queries.numbered())
    if not call.packed:
        queries = keys = jax.tree.map(lambda x: x[:1], queries)
    return layout_of(call), queries, keys


def layout_of(call: AttentionCall) -> Layout:
    """The layout of a call."""
    return Layout(call.mask, call.q.shape[1], call.k.shape[1], own_keys=call.own_keys, packed=call.packed)


def plan_visits(layout: Layout, queries: Tokens, keys: Tokens, block_q: int, block_kv: int, **more: Any) -> tuple[Visits, Visits]:
    """What query blocks visit, and what key blocks visit; arguments as in `tile_kinds`."""
    kinds = tile_kinds(layout, queries, keys, block_q, block_kv, **more)
    rows, columns = layout.widths(block_q, block_kv)
    return ordered(kinds, rows), ordered(jnp.swapaxes(kinds, 2, 3), columns)


def tile_kinds(
    layout: Layout,
    queries: Tokens,
    keys: Tokens,
    block_q: int,
    block_kv: int,
    *,
    keep_first: bool,
    selected: SelectedBlocks | None = None,
    num_heads: int = 1,
    masked: tuple[np.ndarray | int, np.ndarray | int] = (MASKED, MASKED),
    choice_alone: int = MASKED,
) -> Array:
    """The kind of each tile, int32 [B or 1, H or 1, NQ, NK].

    Tokens are padded to whole blocks, int32 [B or 1, H or 1, T or S], and renumbered where the keys are the queries' own. With
    `keep_first` no tile that holds a segment's first key is FULL. A tile is left out only if nothing in it is visible.
    `selected` has indices for all of the padded queries, and `num_heads` is how many heads share them. `masked` [NQ, NK] are, in place of
    MASKED, the kinds of tiles that lie in one segment, their keys in one block, and of others, that hold no visible sink token;
    `choice_alone` is the kind of those of whose keys, all of one block, nothing hides any but the choice.
    """
    mask = layout.mask
    q, k = (_summary(x, block) for x, block in ((queries, block_q), (keys, block_kv)))
    q, k = _Summary(*(x[..., :, None] for x in q)), _Summary(*(x[..., None, :] for x in k))
    near, anchored = layout.near(block_q, block_kv), layout.anchored(block_q, block_kv)
    lift = lambda x: jnp.asarray(x)[None, None]
    some, every = mask.tile(Span(q.low_position, q.high_position), Span(k.low_position, k.high_position))
    sinks = lift(anchored) & (k.low_position < mask.num_sink_tokens)
    visible = (lift(near) | sinks) & some
    visible &= (q.low_segment <= k.high_segment) & (k.low_segment <= q.high_segment)
    alone = (q.segment == k.segment) & (q.segment > 0)
    whole, full = alone & every, FULL
    if keep_first:
        whole &= k.low_position > 0
    if selected is not None:
        shown = selected.tiles(segment_starts(layout, queries, keys, selected), block_q, block_kv, near.shape[1])
        if shown.shape[1] > 1:
            shown = jnp.repeat(shown, num_heads // shown.shape[1], axis=1)
        visible, full = visible & shown, choice_alone
        one_block = k.low_position // selected.block_size == k.high_position // selected.block_size
        whole, alone = whole & one_block, alone & one_block
    one, several = (jnp.where(sinks, MASKED, lift(kinds)) for kinds in masked)
    partly = jnp.where(alone, one, several)
    return jnp.where(visible, jnp.where(whole, full, partly), SKIP)


class _Summary(NamedTuple):
    """Of each block's real tokens, [B, H, N]: ranges of segments and positions; and the segment of all its tokens, else -1."""

    low_segment: Array
    high_segment: Array
    low_position: Array
    high_position: Array
    segment: Array


def _summary(tokens: Tokens, block: int) -> _Summary:
    ids, positions = (x.reshape(*x.shape[:2], -1, block) for x in (tokens.segment_ids, tokens.positions))
    low, high = (lambda x: jnp.where(ids != 0, x, _FAR).min(-1)), (lambda x: jnp.where(ids != 0, x, -_FAR).max(-1))
    alone = jnp.where(ids.min(-1) == ids.max(-1), ids.max(-1), -1)
    return _Summary(low(ids), high(ids), low(positions), high(positions), alone)


def _indices(length: int, block: int) -> Span:
    """The indices [N] at which each block of a sequence begins and ends."""
    low = np.arange(0, length, block)
    return Span(low, np.minimum(low + block, length) - 1)


def segment_starts(layout: Layout, queries: Tokens, keys: Tokens, selected: SelectedBlocks) -> Array:
    """int32 [B or 1, T]: at which key the segment of each query begins, perhaps before the first; of padding anything.

    Args:
      queries, keys: [B or 1, 1, T or S], the keys of a segment one after the other.
      selected: of as many queries, which may know it.
    """
    if selected.starts is not None:
        return selected.starts
    if layout.own_keys:
        return jnp.arange(queries.positions.shape[2], dtype=jnp.int32)[None] - queries.positions[:, 0]
    began = jnp.arange(keys.positions.shape[2], dtype=jnp.int32)[None] - keys.positions[:, 0]
    same = queries.segment_ids[:, 0, :, None] == keys.segment_ids[:, 0, None, :]
    return jnp.max(jnp.where(same, began[:, None], -_FAR), axis=2)


def ordered(kinds: Array, width: int, late: int = SKIP) -> Visits:
    """The tiles that each row of kinds [B, H, N, M] visits, at most `width`; those of the kind `late` behind the others."""
    rank = jnp.where(kinds == SKIP, 2, kinds == late)
    order = jnp.argsort(rank, axis=-1, stable=True)[..., :width]
    count = jnp.sum(kinds != SKIP, axis=-1, keepdims=True)
    step = jnp.arange(width).reshape(1, 1, 1, -1)
    blocks = jnp.take_along_axis(order, jnp.minimum(step, jnp.maximum(count - 1, 0)), axis=-1)
    kind = jnp.where(step < count, jnp.take_along_axis(kinds, blocks, axis=-1), SKIP)
    return Visits((4 * blocks + kind).astype(jnp.int32))
