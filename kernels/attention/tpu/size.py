"""The size of tiles under a mask: large ones are few steps, small ones fit the ends of windows and blocks."""

from functools import lru_cache

from plait.kernels.attention.tpu.edges import CELL, edges
from plait.kernels.attention.visits import Layout

STEP = 10
"""Cells whose cycles a step costs besides, by static estimates for v5e and head dim 128: the grid, and waits of the first and last parts."""

SAMPLE = 32768
"""Tokens that stand for longer sequences."""

GROWTH = 1.25
"""How far tiles may grow, for windows that are a little longer than a tile."""

WORTH = 0.98
"""The usual size stays, unless another has less than this share of its work."""


def least(layout: Layout, usual: tuple[int, int]) -> tuple[int, int]:
    """The queries and keys of the tiles that have the least work where keys are the queries' own: the usual ones, or a square.

    Squares have a multiple of 128 tokens, from a quarter of the usual queries to GROWTH of them, or to them where they are less than 1,024, of
    float32, which VMEM allows no more.
    """
    sample = layout._replace(num_queries=min(layout.num_queries, SAMPLE), num_keys=min(layout.num_keys, SAMPLE))
    queries = usual[0]
    most = int(GROWTH * queries) if queries >= 1024 else queries
    squares = [(size, size) for size in range(CELL, most + 1, CELL) if 4 * size >= queries]
    best = min(squares, key=lambda tile: work(sample, *tile))
    return best if work(sample, *best) < WORTH * work(sample, *usual) else usual


@lru_cache(maxsize=256)
def work(layout: Layout, block_q: int, block_kv: int) -> float:
    """Cells that tiles of a size compute, their steps counted as cells."""
    known = edges(layout, block_q, block_kv)
    return STEP * known.steps + known.num_cells
