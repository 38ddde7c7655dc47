"""The size of tiles under a mask: large ones are few steps, small ones fit the ends of windows and blocks."""

from plait.kernels.attention.tpu.edges import CELL, FIRST_EDGE, edges
from plait.kernels.attention.visits import Layout

STEP = 18
"""Cells whose cycles a step costs besides, by static estimates of the forward pass for v5e and head dim 128: the grid, and waits of the first
and last parts. On v6e it is 30."""

SAMPLE = 32768
"""Tokens that stand for longer sequences."""

GROWTH = 256
"""By how many tokens tiles may grow, for windows that are a little longer than a tile."""

CODE = 640
"""The most cells of all kinds of tiles of an unusual size: each is code of its own, that is compiled and fetched."""

WORTH = 0.93
"""The usual size stays, unless another has less than this share of its work."""


def least(layout: Layout, usual: tuple[int, int]) -> tuple[int, int]:
    """The queries and keys of the tiles that have the least work where keys are the queries' own: the usual ones, or a square.

    Squares have a multiple of 128 tokens, from a quarter of the usual queries to GROWTH beyond the usual keys, or to the usual queries where
    they are less than 1,024, of float32, which VMEM allows no more.
    """
    sample = layout._replace(num_queries=min(layout.num_queries, SAMPLE), num_keys=min(layout.num_keys, SAMPLE))
    queries, keys = usual
    most = keys + GROWTH if queries >= 1024 else queries
    squares = [(size, size) for size in range(CELL, most + 1, CELL) if 4 * size >= queries]
    best = min((tile for tile in squares if code(sample, *tile) <= CODE), key=lambda tile: work(sample, *tile), default=usual)
    return best if work(sample, *best) < WORTH * work(sample, *usual) else usual


def work(layout: Layout, block_q: int, block_kv: int) -> float:
    """Cells that tiles of a size compute, their steps counted as cells."""
    known = edges(layout, block_q, block_kv)
    return STEP * known.steps + known.num_cells


def code(layout: Layout, block_q: int, block_kv: int) -> int:
    """Cells of the kinds of tiles that a kernel is made with."""
    known, whole = edges(layout, block_q, block_kv), block_q * block_kv // CELL**2
    shown = (whole if kind < FIRST_EDGE else sum(map(bool, sum(known.shown(kind)[0], ()))) for kind in known.possible)
    return sum(shown)
