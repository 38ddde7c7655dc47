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

WORTH = 0.95
"""The usual size stays, unless another has less than this share of its work."""


def least(layout: Layout, usual: int) -> int:
    """The size of square tiles, a multiple of 128, that has the least work where keys are the queries' own: from a quarter of the usual size
    to GROWTH of it, or to itself where it is less than 1,024, of float32, which VMEM allows no more."""
    sample = layout._replace(num_queries=min(layout.num_queries, SAMPLE), num_keys=min(layout.num_keys, SAMPLE))
    most = int(GROWTH * usual) if usual >= 1024 else usual
    sizes = [size for size in range(CELL, most + 1, CELL) if 4 * size >= usual]
    best = min(sizes, key=lambda size: work(sample, size))
    return best if work(sample, best) < WORTH * work(sample, usual) else usual


@lru_cache(maxsize=256)
def work(layout: Layout, size: int) -> float:
    """Cells that tiles of a size compute, their steps counted as cells."""
    known = edges(layout, size, size)
    return STEP * known.steps + known.num_cells
