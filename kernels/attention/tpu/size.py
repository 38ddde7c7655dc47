"""The size of tiles under a mask: large ones are few steps, small ones fit the ends of windows and blocks."""

from functools import partial

from plait.kernels.attention.tpu.edges import CELL, FIRST_EDGE, edges
from plait.kernels.attention.visits import Layout

SAMPLE = 32768
"""Tokens that stand for longer sequences."""

CODE = 640
"""The most cells of all kinds of tiles of an unusual size: each is code of its own, that is compiled and fetched."""

WORTH = 0.93
"""The usual size stays, unless another has less than this share of its work."""


def least(layout: Layout, usual: tuple[int, int], *, largest: int, step: int) -> tuple[int, int]:
    """The queries and keys of the tiles that have the least work where keys are the queries' own: the usual ones, or a square.

    Squares have a multiple of 128 tokens, from a quarter of the usual queries to the largest; `step` is what a tile costs besides, in cells.
    """
    sample = layout._replace(num_queries=min(layout.num_queries, SAMPLE), num_keys=min(layout.num_keys, SAMPLE))
    squares = [(size, size) for size in range(CELL, largest + 1, CELL) if 4 * size >= usual[0]]
    of = partial(work, sample, step=step)
    best = min((tile for tile in squares if code(sample, *tile) <= CODE), key=lambda tile: of(*tile), default=usual)
    return best if of(*best) < WORTH * of(*usual) else usual


def work(layout: Layout, block_q: int, block_kv: int, *, step: int) -> float:
    """Cells that tiles of a size compute, their steps counted as cells."""
    known = edges(layout, block_q, block_kv)
    return step * known.steps + known.num_cells


def code(layout: Layout, block_q: int, block_kv: int) -> int:
    """Cells of the kinds of tiles that a kernel is made with."""
    known, whole = edges(layout, block_q, block_kv), block_q * block_kv // CELL**2
    shown = (whole if kind < FIRST_EDGE else sum(map(bool, sum(known.shown(kind)[0], ()))) for kind in known.possible)
    return sum(shown)
