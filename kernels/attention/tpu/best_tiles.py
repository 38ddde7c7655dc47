"""The tiles of attention by generation and head dim, as `benchmarks/attention_tiles.py` finds them by the compiler's static cycles.

Where candidates differ by less than 0.2% in what it finds, the one is taken that other chips or head dims have too.
"""

from plait.kernels.attention.tpu.tiling import Tile, Tiles


def _tiles(
    part: tuple[int, int],
    edge: tuple[int, int],
    gradients: tuple[int, int] = (256, 1024),
    *,
    gradients_edge: tuple[int, int] = (512, 256),
    largest: tuple[int, int] = (2304, 1280),
    steps: tuple[int, int] = (18, 18),
    mass_by_product: bool = False,
    sums_by_key_column: bool = False,
) -> Tiles:
    """Of the forward pass queries and keys of a part and of one of an edge; of gradients likewise; of both the largest square that takes the
    tile's place, and what a step costs."""
    return Tiles(
        forward=Tile(1024, 2048, *part, *edge, largest[0], steps[0]),
        gradients=Tile(1024, 1024, *gradients, *gradients_edge, largest[1], steps[1]),
        mass_by_product=mass_by_product,
        sums_by_key_column=sums_by_key_column,
    )


_V5 = {
    64: _tiles((256, 256), (512, 128)),
    128: _tiles((128, 128), (512, 128)),
    256: _tiles((128, 128), (128, 128), gradients=(256, 512)),  # with 1,024 keys statistics of a sigmoid do not fit VMEM
}
_V6E = _tiles(
    (512, 512),
    (4096, 128),
    gradients=(256, 256),
    gradients_edge=(256, 256),
    largest=(4096, 4096),
    steps=(36, 11),
    mass_by_product=True,
    sums_by_key_column=True,
)  # edges of as many queries as a tile has: the best over all kinds of edges that a causal mask or a window has
BFLOAT16 = {
    "v5e": _V5,
    "v5p": _V5,
    "v6e": {
        64: _V6E,
        128: _V6E,
        256: _tiles((256, 512), (256, 256)),
    },
    "tpu7x": {
        64: _tiles((512, 512), (512, 256), gradients=(256, 256), mass_by_product=True, sums_by_key_column=True),
        128: _tiles((512, 1024), (512, 256), gradients=(256, 256), mass_by_product=True, sums_by_key_column=True),
        256: _tiles((256, 512), (256, 256), gradients=(512, 1024)),
    },
}
"""By generation and the least head dim that is as large; 16 bits an element. v5p has v5e's order of candidates."""

FLOAT32 = Tiles(
    forward=Tile(512, 512, 128, 128, 128, 128, largest=512),
    gradients=Tile(512, 512, 256, 512, 256, 256, largest=512),
)
"""For any generation and head dim: what compiles within 16 MiB of scoped VMEM, the default limit of v5e and v5p."""

SELECTED = {2: (2048, 1 << 20), 4: (1024, 1 << 18)}
"""Where queries select blocks, by the bytes of an element: the most rows of a product, that is queries of all heads that share a tile, and
pairs of a row and a key. For any generation and head dim, within the same limit."""
