"""The rectangles in which a tile of selected blocks is computed, and which of their keys a query sees."""

from collections.abc import Sequence
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

EDGE_ROWS, EDGE_KEYS = 512, 128
"""The most queries and keys of a rectangle of a tile on the diagonal."""


class Rectangle(NamedTuple):
    """What a kernel computes at once: some queries [M, ...] and some keys of a tile."""

    queries: slice
    keys: slice
    visible: Visible | None
    """Which of its keys, counted from its own first one, a query sees; None is all."""
    chosen: Array | None
    """The queries that see any, bool [1, M]; None is all, of `visible` too."""


class Rectangles(NamedTuple):
    """Of the tiles of one kernel."""

    problem: Problem
    cut: Cut
    edge: Edges | None
    """Tiles on the diagonal, of which order hides a part: of heads that choose by themselves, among the queries' own keys."""
    most: tuple[int, int]

    @classmethod
    def under(cls, problem: Problem, *, forward: bool) -> "Rectangles":
        """Those of a problem, of its forward pass or another."""
        cut: Cut = problem.tiles
        most = MOST_WIDE if cut.wide else MOST_FORWARD if forward and cut.heads == 1 else MOST
        return cls(problem, cut, _edge(problem.layout, cut), most)

    def kinds(self, together: int) -> list[tuple[int, ...]]:
        """Of the tiles that are visited together; the first stand for all others too. In a tile of several blocks the choice is never
        alone, and what stands on the diagonal is last."""
        found, edge = [(MASKED,) * together], [FIRST_EDGE] if self.edge else []
        if self.cut.block_size >= self.cut.keys:
            found.append((FULL,) * together)
            edge = [*[FULL] * (together - 1), *edge] if edge else []
        if edge:
            found.append(tuple(edge))
            if together > 1:
                found.append((FIRST_EDGE, *[SKIP] * (together - 1)))
        return found

    @property
    def largest(self) -> tuple[int, int]:
        """Queries and keys of the largest."""
        keys, queries, *_ = self._cuts(MASKED, self.cut.keys * (self.cut.visited if self.cut.keys < LANES else 1))[0]
        return queries.stop, keys.stop

    def of(self, kinds: Sequence[int], queries: Array, keys: Sequence[Array], bits: Sequence[Array]) -> list[Rectangle]:
        """All that may be visible in tiles of these kinds; the queries of some keys follow one another. Small tiles are one.

        Args:
          queries: tokens [2, T] of the queries of a head.
          keys: tokens [N, 2] of the tiles of keys that were brought together.
          bits: [1, T] of `SelectedBlocks.bits`, of each of them.
        """
        if self.cut.keys < LANES:
            return self._of(FULL if set(kinds) == {FULL} else MASKED, 0, queries, keys, bits)
        each = enumerate(zip(kinds, keys, bits, strict=True))
        return [
            part
            for n, (kind, tokens, chosen) in each
            if kind != SKIP
            for part in self._of(kind, n * self.cut.keys, queries, [tokens], [chosen])
        ]

    def _of(self, kind: int, first: int, queries: Array, keys: Sequence[Array], bits: Sequence[Array]) -> list[Rectangle]:
        """Of one tile, whose keys are those from the first on."""
        found = []
        for at, columns, rows, cells in self._cuts(kind, len(keys) * self.cut.keys):
            repeats = (columns.stop - columns.start) // (rows.stop - rows.start)
            repeated = lambda x, repeats=repeats: jnp.concatenate([x] * repeats, axis=1)

            def under_mask(some: slice, at: slice = at, rows: slice = rows, repeated: Any = repeated) -> Any:
                wanted = slice(at.start + some.start, at.start + some.stop)
                return [(slice(None), repeated(self._visible(queries[:, rows], keys, [x[:, rows] for x in bits], wanted)))]

            def of_choice(some: slice, at: slice = at, rows: slice = rows, repeated: Any = repeated) -> Any:
                shown, found = [(x[:, rows] & 1) == 1 for x in bits], []
                for n in range(some.start, some.stop, self.cut.keys):
                    of_tile = shown[(at.start + n) // self.cut.keys]
                    found.append(jnp.broadcast_to(of_tile, (min(self.cut.keys, some.stop - n), of_tile.shape[1])))
                return [(slice(None), repeated(jnp.concatenate(found, axis=0)))]

            def partly(some: slice, part: slice, at: slice = at, rows: slice = rows) -> Array:
                each = slice(rows.start + part.start, rows.start + part.stop)
                return seen(self.problem, queries[:, each], keys[0][at.start + some.start : at.start + some.stop])

            several = kind == FULL and len(keys) > 1
            visible = under_mask if kind == MASKED else of_choice if several else of_cells(cells, partly)
            chosen = None if kind == MASKED or several else repeated((bits[0][:, rows] & 1) == 1)
            found.append(Rectangle(columns, slice(first + at.start, first + at.stop), visible, chosen))
        return found

    def _cuts(self, kind: int, num_keys: int) -> list[tuple[slice, slice, slice, Cells]]:
        """Keys, queries [M] and the tokens [T] of these, whole heads or a part of one, and of a tile in which the choice is apart its cells."""
        cut = self.cut
        if kind == FIRST_EDGE and self.edge:
            cells, _ = self.edge.shown(kind)
            if not cut.wide:
                tile = Tile(cut.queries, cut.keys, edge_q=EDGE_ROWS, edge_kv=EDGE_KEYS)
                parts = [(at, part) for at, parts in edge_parts(cells, False, tile) for part in parts]
                return [(at, part.queries, part.queries, part.cells) for at, part in parts]
        pairs, most_keys = self.most
        most = pairs // min(num_keys, most_keys)
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

    def _visible(self, queries: Array, keys: Sequence[Array], bits: Sequence[Array], wanted: slice) -> Array:
        """bool [N, T]."""
        found = []
        for n, tokens in enumerate(keys):
            first, last = (min(max(end - n * self.cut.keys, 0), self.cut.keys) for end in (wanted.start, wanted.stop))
            if first < last:
                found.append(self._chosen(queries, tokens[first:last], bits[n], first))
        return jnp.concatenate(found, axis=0)

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
        any(map(any, known.cells[0][at.start : at.stop])) for at in cuts(0, cut.keys // CELL, EDGE_KEYS // CELL)
    )
    return known if shown else None
