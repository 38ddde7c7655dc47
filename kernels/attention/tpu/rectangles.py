"""The rectangles in which a tile of selected blocks is computed, and which of their keys a query sees."""

from collections.abc import Sequence
from functools import reduce
from operator import and_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels.attention.tpu.bands import banded_edges
from plait.kernels.attention.tpu.cut import Cut
from plait.kernels.attention.tpu.edges import CELL, FIRST_EDGE, Cells, Edges
from plait.kernels.attention.tpu.tiling import LANES, Problem, Tile, cells_of, cuts, edge_parts
from plait.kernels.attention.tpu.weights import Visible, of_cells, seen
from plait.kernels.attention.visits import FULL, MASKED, SKIP, Layout
from plait.kernels.masks import block_number

Array = jax.Array

MOST = 1 << 17, 512
"""The most pairs of a query and a key, and the most keys, of a rectangle: a tile has several, which overlap."""

MOST_FORWARD = 1 << 16, 128
"""Likewise in the forward pass of heads that choose by themselves, whose tiles have few rows."""

MOST_WIDE = 1 << 18, 512
"""Likewise for a wide matrix unit, of any pass and heads."""

EDGE = 512, 128
"""The most queries and keys of a rectangle of a tile on the diagonal, from which what order hides is left out."""

EDGE_WIDE = 512, 256
"""Likewise for a wide matrix unit, in gradients; in its forward pass such a tile has rectangles like others."""


class Rectangle(NamedTuple):
    """What a kernel computes at once: some queries [M, ...] and some keys of a tile."""

    queries: slice
    keys: slice
    visible: Visible | None
    """Which of its keys, counted from its own first one, a query sees; None is all."""
    chosen: Sequence[Array] | None
    """Of each of equal shares of its keys the queries that see any, bool [1, M]; None is all, of `visible` too."""


class Rectangles(NamedTuple):
    """Of the tiles of one kernel."""

    problem: Problem
    cut: Cut
    edge: Edges | None
    """Tiles on the diagonal, of which order hides a part: of heads that choose by themselves, among the queries' own keys."""
    most: tuple[int, int]
    most_edge: tuple[int, int] | None

    @classmethod
    def under(cls, problem: Problem, *, forward: bool) -> "Rectangles":
        """Those of a problem, of its forward pass or another."""
        cut: Cut = problem.tiles
        most = MOST_WIDE if cut.wide else MOST_FORWARD if forward and cut.heads == 1 else MOST
        most_edge = EDGE if not cut.wide else None if forward else EDGE_WIDE
        return cls(problem, cut, _edge(problem.layout, cut), most, most_edge)

    def kinds(self, together: int) -> list[tuple[int, ...]]:
        """Of the tiles that are visited together, by `fit` the first that does; the last fit all. In a tile of several blocks the choice is
        never alone; where it may be, tiles of which more hides keys are visited first: that on the diagonal, or of few keys as many as the
        queries have of their own."""
        found, rest, apart = [], together - 1, self.cut.block_size >= self.cut.keys
        own = max(1, self.cut.queries // self.cut.keys)
        if apart:
            found += [(FULL, *[SKIP] * rest), (FULL,) * together]
        if self.edge:
            found += [(FIRST_EDGE, *[SKIP] * rest), (FIRST_EDGE, *[FULL] * rest)]
        elif apart and own < together:
            found.append((*[MASKED] * own, *[FULL] * (together - own)))
        return [*dict.fromkeys(found), (MASKED,) * together]

    @staticmethod
    def fit(kinds: Sequence[int], tiles: Sequence[Any]) -> Any:
        """Whether what is computed for these kinds is right for tiles of other kinds: nothing is chosen of those beyond the end of a list."""
        alike = ((of == kind) | ((kind == FULL) & (of == SKIP)) for kind, of in zip(kinds, tiles, strict=True) if kind != MASKED)
        return reduce(and_, alike, True)

    @property
    def largest(self) -> tuple[int, int]:
        """Queries and keys of the largest."""
        keys, queries, *_ = self._cuts(MASKED, self._together)[0]
        return queries.stop, keys.stop

    @property
    def _together(self) -> int:
        """Keys that are computed as one at most: those of small tiles, or of one."""
        return self.cut.keys * (self.cut.visited if self.cut.keys < LANES else 1)

    def of(self, kinds: Sequence[int], queries: Array, keys: Sequence[Array], bits: Sequence[Array]) -> list[Rectangle]:
        """All that may be visible in tiles of these kinds; the queries of some keys follow one another. Small tiles are one.

        Args:
          queries: tokens [2, T] of the queries of a head.
          keys: tokens [N, 2] of the tiles of keys that were brought together.
          bits: [1, T] of `SelectedBlocks.bits`, of each of them.
        """
        each = [[n] for n in range(len(kinds))] if self.cut.keys >= LANES else [range(len(kinds))]
        found = []
        for numbers in each:
            some = [n for n in numbers if kinds[n] != SKIP]
            if some:
                found += self._of([kinds[n] for n in some], some[0], queries, [keys[n] for n in some], [bits[n] for n in some])
        return found

    def _of(
        self, kinds: Sequence[int], number: int, queries: Array, keys: Sequence[Array], bits: Sequence[Array]
    ) -> list[Rectangle]:
        """Of tiles from a number on that are computed as one."""
        found, size, first = [], self.cut.keys, number * self.cut.keys
        for at, columns, rows, cells in self._cuts(kinds[0], len(keys) * size):
            repeats = (columns.stop - columns.start) // (rows.stop - rows.start)
            repeated = lambda x, repeats=repeats: jnp.concatenate([x] * repeats, axis=1)
            tiles = range(at.start // size, -(-at.stop // size))

            def of_each(some: slice, at: slice = at, rows: slice = rows, repeated: Any = repeated) -> Any:
                wanted = slice(at.start + some.start, at.start + some.stop)
                shown = self._visible(kinds, queries[:, rows], keys, [x[:, rows] for x in bits], wanted)
                return [(slice(None), None if shown is None else repeated(shown))]

            def partly(some: slice, part: slice, at: slice = at, rows: slice = rows) -> Array:
                each = slice(rows.start + part.start, rows.start + part.stop)
                return seen(self.problem, queries[:, each], keys[0][at.start + some.start : at.start + some.stop])

            under_mask = [kinds[n] == MASKED for n in tiles]
            chosen = [(bits[n][:, rows] & 1) == 1 for n in tiles]
            chosen = [jnp.ones_like(x) if masked else x for x, masked in zip(chosen, under_mask, strict=True)]
            found.append(
                Rectangle(
                    columns,
                    slice(first + at.start, first + at.stop),
                    of_each if any(under_mask) else of_cells(cells, partly) if cells else None,
                    None if all(under_mask) else [repeated(x) for x in chosen],
                )
            )
        return found

    def _cuts(self, kind: int, num_keys: int) -> list[tuple[slice, slice, slice, Cells]]:
        """Keys, queries [M] and the tokens [T] of these, whole heads or a part of one, and of a tile in which the choice is apart its cells."""
        cut = self.cut
        if kind == FIRST_EDGE and self.edge:
            cells, _ = self.edge.shown(kind)
            if self.most_edge:
                most_queries, most_keys = self.most_edge
                tile = Tile(cut.queries, cut.keys, edge_q=most_queries, edge_kv=most_keys)
                parts = [(at, part) for at, parts in edge_parts(cells, False, tile) for part in parts]
                return [(at, part.queries, part.queries, part.cells) for at, part in parts]
        pairs, most_keys = self.most
        most = pairs // min(self._together, most_keys)
        together = max(1, most // cut.queries)  # heads
        columns = []
        for head in range(0, cut.heads, together):
            some = min(together, cut.heads - head)
            for rows in [slice(0, cut.queries)] if some > 1 else cuts(0, cut.queries, most):
                first = head * cut.queries
                columns.append((slice(first + rows.start, first + (some - 1) * cut.queries + rows.stop), rows))
        found = [(at, *some) for at in cuts(0, num_keys, most_keys) for some in columns]
        if kind != FIRST_EDGE:
            return [(*each, ()) for each in found]
        shown = [(*each, cells_of(cells, each[0], each[2])) for each in found]
        return [each for each in shown if any(map(any, each[3]))]

    def _visible(
        self, kinds: Sequence[int], queries: Array, keys: Sequence[Array], bits: Sequence[Array], wanted: slice
    ) -> Array | None:
        """bool [N, T] of the keys that are wanted of these tiles, of one kind; None where the choice alone hides any."""
        found = []
        for n, (kind, tokens, chosen) in enumerate(zip(kinds, keys, bits, strict=True)):
            first, last = (min(max(end - n * self.cut.keys, 0), self.cut.keys) for end in (wanted.start, wanted.stop))
            if first < last and kind == MASKED:
                found.append(self._chosen(queries, tokens[first:last], chosen, first))
        return jnp.concatenate(found, axis=0) if found else None

    def _chosen(self, queries: Array, keys: Array, bits: Array, first: int) -> Array:
        """bool [N, T] of keys of a tile from its `first` on."""
        size, visible, at = self.cut.block_size, seen(self.problem, queries, keys), keys[:, 1:2]
        begin = jnp.maximum(at - first - jax.lax.broadcasted_iota(jnp.int32, at.shape, 0), 0)
        entry = jnp.broadcast_to(block_number(at, size) - block_number(begin, size), visible.shape)
        return visible & ((jax.lax.shift_right_logical(jnp.broadcast_to(bits, visible.shape), entry) & 1) == 1)


def _edge(layout: Layout, cut: Cut) -> Edges | None:
    if cut.heads > 1 or not cut.block_size >= cut.keys >= CELL or not layout.own_keys:
        return None
    known = banded_edges(layout, cut.queries, cut.keys)
    shown = known.cells and all(
        any(map(any, known.cells[0][at.start : at.stop])) for at in cuts(0, cut.keys // CELL, EDGE[1] // CELL)
    )
    return known if shown else None
