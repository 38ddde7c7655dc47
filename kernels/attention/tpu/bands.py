"""What order shows of a cell by distance alone: known before the tokens are, so that a kernel compares no positions and no segments."""

from functools import lru_cache

import numpy as np

from plait.kernels.attention.tpu.edges import CELL, FIRST_EDGE, PARTLY, Band, Edges, edges
from plait.kernels.attention.visits import Layout
from plait.kernels.masks import Span

MOST = 1024
"""Cells of different positions that are looked at; a mask that has more of them is compared in the kernel."""


@lru_cache(maxsize=256)
def banded_edges(layout: Layout, block_q: int, block_kv: int) -> Edges:
    """The edges of a layout, with bands for PARTLY where all tiles of one cut and one segment have the same."""
    known = edges(layout, block_q, block_kv)
    if layout.packed and layout.mask.alignment > 1:  # segments move what order shows
        return known
    cuts = []
    for cut, cells in enumerate(known.cells):
        tiles = np.argwhere(known.kinds == FIRST_EDGE + cut) * (block_q, block_kv)
        at = lambda key, query, tiles=tiles: tiles + np.array([query * CELL, key * CELL])
        cuts.append(
            tuple(
                tuple(_common(layout, at(key, query)) or state if state == PARTLY else state for query, state in enumerate(row))
                for key, row in enumerate(cells)
            )
        )
    return known._replace(cells=tuple(cuts))


def _common(layout: Layout, corners: np.ndarray) -> Band | None:
    """The band of cells that begin at these queries and keys [N, 2], if they have one."""
    distance, phase = corners[:, 0] - corners[:, 1], corners[:, 0] % layout.mask.alignment  # what a rule goes by
    _, first = np.unique(np.stack([distance, phase], axis=1), axis=0, return_index=True)
    if len(first) > MOST:
        return None
    of = {_band(layout, int(q), int(k)) for q, k in corners[first]}
    return of.pop() if len(of) == 1 else None


def _band(layout: Layout, query: int, key: int) -> Band | None:
    """The band of the cell that begins there, or None where what is seen is none."""
    a, b = np.arange(CELL)[None, :], np.arange(CELL)[:, None]
    some, every = layout.by_order(Span(query + a, query + a), Span(key + b, key + b))
    apart = a - b
    if not np.array_equal(some, every) or not some.any():
        return None
    band = Band(int(apart[some].min()), int(apart[some].max()))
    return band if np.array_equal(some, (band.low <= apart) & (apart <= band.high)) else None
