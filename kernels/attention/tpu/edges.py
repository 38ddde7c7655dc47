"""Tiles of which the order of tokens alone hides a part: those on the diagonal and at the ends of windows. That part is not computed."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from plait.kernels.attention.visits import FULL, MASKED, Layout
from plait.kernels.masks import Span

CELL = 128
"""Tokens on either side of what is computed or left out."""

FIRST_EDGE = FULL + 1
"""Kinds of tile from here on, beyond those of `visits`: computed without what order hides, and under the mask where order does not show all
or, of the second half of these kinds, everywhere, since there are several segments or padding."""

MAX_EDGES = 8
"""Cuts of such tiles, each of which is code of its own in a kernel, twice where rows are packed; tiles of rarer ones are MASKED."""

HIDDEN, PARTLY, WHOLLY = 0, 1, 2


class Band(NamedTuple):
    """The keys of a cell that its queries see: by the number of a query in it less that of a key, from `low` to `high`."""

    low: int
    high: int


Sight = int | Band
"""What is visible of a cell: nothing, what the mask shows, everything, or a band."""

Cells = tuple[tuple[Sight, ...], ...]
"""What order shows of each cell, of each CELL keys those of the queries, within one segment."""


class Edges(NamedTuple):
    """What is known of a layout's tiles before the tokens are."""

    kinds: np.ndarray
    """int [NQ, NK]: the kind of a tile of one segment that is not wholly visible and holds no sink token."""
    cells: tuple[Cells, ...]
    """Of the kinds from FIRST_EDGE on, of one segment and again of several."""
    possible: tuple[int, ...]
    """The kinds that tiles can have, SKIP aside."""
    steps: int
    """Tiles that order can show some of."""
    num_cells: int
    """Cells that are computed in these. Where keys are not the queries' own, both are what `Layout.expected` says."""

    @property
    def of_several(self) -> np.ndarray:
        """int [NQ, NK]: the kind of such a tile of several segments or padding, of which order hides the same."""
        return np.where(self.kinds < FIRST_EDGE, MASKED, self.kinds + len(self.cells))

    def shown(self, kind: int) -> tuple[Cells, bool]:
        """What is computed in a tile of a kind from FIRST_EDGE on, and whether there may be several segments."""
        several, cut = divmod(kind - FIRST_EDGE, len(self.cells))
        return self.cells[cut], bool(several)


@lru_cache(maxsize=256)
def edges(layout: Layout, block_q: int, block_kv: int) -> Edges:
    """The edges of a layout, of which an array must not be written to."""
    near = layout.near(block_q, block_kv)
    kinds = np.full(near.shape, MASKED)
    size = (block_q // CELL) * (block_kv // CELL)
    if not layout.own_keys:
        steps = layout.expected(block_q, block_kv)
        return Edges(kinds, (), (MASKED, FULL), steps, steps * size)
    q, k = np.arange(near.shape[0])[:, None] * block_q, np.arange(near.shape[1])[None, :] * block_kv
    _, every = layout.by_order(Span(q, q + block_q - 1), Span(k, k + block_kv - 1))
    i, j = np.nonzero(near & ~every)
    q, k = (n[:, None] * block + np.arange(0, block, CELL) for n, block in ((i, block_q), (j, block_kv)))
    q, k = q[:, None, :], k[:, :, None]
    some, all_of = layout.by_order(Span(q, q + CELL - 1), Span(k, k + CELL - 1))
    states = np.where(some, np.where(all_of, WHOLLY, PARTLY), HIDDEN)
    states = np.broadcast_to(states, (len(i), block_kv // CELL, block_q // CELL))
    patterns, which, counts = np.unique(states, axis=0, return_inverse=True, return_counts=True)
    parts = [n for n in np.argsort(-counts, kind="stable") if not patterns[n].all()][:MAX_EDGES]
    kind_of = np.full(len(patterns), MASKED)
    kind_of[parts] = FIRST_EDGE + np.arange(len(parts))
    kinds[i, j] = kind_of[which.reshape(-1)]
    work = np.full(len(patterns), size)
    work[parts] = (patterns[parts] != HIDDEN).sum((1, 2))
    possible = set(kinds[i, j])
    padded = bool(layout.num_queries % block_q or layout.num_keys % block_kv)
    if layout.packed or padded:
        possible |= {kind + len(parts) for kind in possible if kind >= FIRST_EDGE}
    if (near & every).any() or (layout.packed and layout.mask.alignment > 1):  # a segment may start where blocks of positions do
        possible |= {FULL, MASKED} if layout.packed or padded else {FULL}
    if layout.mask.num_sink_tokens:
        possible.add(MASKED)
    cells = tuple(tuple(tuple(int(x) for x in row) for row in patterns[n]) for n in parts)
    steps = int(near.sum())
    return Edges(kinds, cells, tuple(sorted(int(x) for x in possible)), steps, (steps - len(i)) * size + int(counts @ work))
