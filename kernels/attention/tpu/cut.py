"""How attention to selected blocks for TPU is cut: as many heads and queries a tile as fill a product, as few as choose alike."""

from dataclasses import dataclass
from math import gcd

from plait.kernels.attention.tpu.tiling import LANES, rounded_up
from plait.kernels.masks import SelectedBlocks

VISIT_PAIRS, VISIT_TILES, VISIT_KEYS = 1 << 21, 4, 512
"""For a wide matrix unit: the most pairs of a row and a key in a visit, and the most tiles, or as many small ones as have so many keys."""

MAX_HEADS = 16
"""Heads whose queries share a tile."""

SMALL = (32, 64)
"""Blocks of fewer than 128 keys that are tiles of their own; others share a tile."""


@dataclass(frozen=True)
class Cut:
    """How the work is cut, in tokens."""

    block_size: int
    """Keys a block that queries select."""
    heads: int
    """Query heads of a tile, which share keys and choice."""
    queries: int
    """Queries a tile, of each head; a multiple of 128."""
    keys: int
    """Keys a tile: 32, 64 or a multiple of 128."""
    wide: bool = False
    """For a matrix unit of 256 rows and columns, with operands of 16 bits."""
    visited: int = 1
    """Tiles of keys that a visit brings together, which may stand anywhere."""

    @property
    def mass_by_product(self) -> bool:
        """See `plait.kernels.attention.tpu.tiling.Tiles`."""
        return self.wide

    @property
    def sums_by_key_column(self) -> bool:
        """Likewise; tiles of fewer keys fill no row of memory."""
        return self.wide and self.keys >= LANES

    @staticmethod
    def of(
        heads: tuple[int, int], lengths: tuple[int, int], blocks: SelectedBlocks, rows: int, pairs: int, *, wide: bool = False
    ) -> "Cut":
        """The cut into tiles of at most so many rows, that is queries of all heads, and so many pairs of a row and a key. There are as many
        queries as a block has keys, since neighbours select alike, but a quarter of the pairs where they can be, which a visit is worth, and no
        more keys than a block has.

        A visit brings so many tiles of keys that a product has 128, and for a wide matrix unit as many as `VISIT_PAIRS` and the others allow,
        so that products of one tile begin while those of another end: what queries that choose alike have, in the fewest visits of one size,
        and where there are several, small tiles as they fill the unit.

        Args:
          heads: of queries, and of keys.
          lengths: queries, and keys.
        """
        shared = gcd(heads[0] // heads[1], heads[0] // blocks.indices.shape[2])
        together = max(n for n in range(1, min(shared, MAX_HEADS) + 1) if shared % n == 0)
        most = _tokens(blocks.block_size)
        enough = min(rows // 2, pairs // most // 4)
        queries = min(max(blocks.block_size, enough // together), rows // together)
        queries = min(_tokens(queries), _tokens(lengths[0] + LANES - 1))
        keys = min(most, _tokens(pairs // (queries * together)), _tokens(lengths[1] + LANES - 1))
        if blocks.block_size in SMALL:
            keys = blocks.block_size
        visited = max(1, LANES // keys)
        if wide:
            most = max(visited, min(VISIT_PAIRS // (together * queries * keys), max(VISIT_TILES, VISIT_KEYS // keys)))
            chosen = -(-(blocks.indices.shape[3] * blocks.block_size + max(queries - blocks.block_size, 0)) // keys)
            chosen = max(1, min(chosen, -(-lengths[1] // keys)))
            num_visits = -(-chosen // most)
            visited = max(visited, -(-chosen // num_visits))
            if num_visits > 1:
                visited = min(most, rounded_up(visited, max(1, 2 * LANES // keys)))
        return Cut(blocks.block_size, together, queries, keys, wide, visited)

    def longest_list(self, lengths: tuple[int, int]) -> int:
        """The most tiles that one of queries, or one of keys, may have to do with; `lengths` as in `of`."""
        return max(-(-lengths[0] // self.queries), -(-lengths[1] // self.keys))


def _tokens(n: int) -> int:
    """A multiple of 128, at least one."""
    return max(n // LANES, 1) * LANES
