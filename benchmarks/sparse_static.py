"""Static cycles of what sparse attention on TPU is made of: tiles under a mask, visits where blocks are selected, and choosing.

    python benchmarks/sparse_static.py [--target v5e] [--only tiles,masks,visits,choosing]

Needs the extra `aot`. Cycles are the compiler's estimates (`tpu_static.py`), one head dim, 128, in bfloat16; a kernel that it has none for is
"-". Tiles are those of a row of 8 by 8, and an edge is a tile on the diagonal. Masks are those of windows and PowerAttention in the tiles that
the kernels take, each kind compiled; shares are of the speed-up over full causal attention that their density promises. A visit is what one
more costs a loop: of two tiles where the matrix unit is 256 wide, of 1,024 keys one.
Of key gradients under a mask v5e and v5p have no estimate: gradients are estimated without one there, and those of masks by the cells of their
tiles. Of choosing, XLA's estimates of all but kernels are given.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import tpu_static

from plait.kernels import Mask, PowerMask
from plait.kernels.attention.pallas_tpu import choose_tiles
from plait.kernels.attention.tpu.bands import banded_edges
from plait.kernels.attention.tpu.edges import FIRST_EDGE, Cells
from plait.kernels.attention.tpu.tiling import Tile
from plait.kernels.attention.visits import Layout

LENGTH = 8192
"""Of the square of tiles."""

VISITS = (33, 65)

CUTS = (
    (64, 16, 128, 64),
    (64, 16, 128, 128),
    (64, 4, 256, 64),
    (1024, 1, 1024, 1024),
    (512, 1, 512, 512),
    (256, 1, 1024, 256),
    (128, 1, 1024, 128),
)
"""Block size, heads, queries and keys of a tile where blocks are selected."""

MASKS = {
    **{f"window {n}": Mask(window_size=n) for n in (4480, 2176, 1152)},
    **{f"power, blocks of {n}": PowerMask(block_size=n) for n in (1024, 512, 256)},
}

TOKENS = 32768
"""Of rows under these masks, or a few less, for whole tiles."""

DIAGONAL = [[0 if query < key else 2 if query > key else (0, 127) for query in range(8)] for key in range(16)]
"""Of each 128 of 2,048 keys what order shows to 128 of the first 1,024 queries: nothing, a band, all. A tile of fewer keys has the first."""


class Masked:
    """One kernel's cycles under masks."""

    def __init__(self, kernel: str, cycles: Callable[..., int | None], *, by_cells: bool):
        """`cycles` of a job; `by_cells` takes tiles of which order hides a part for as many visible cells."""
        self.kernel, self.cycles, self.by_cells = kernel, cycles, by_cells
        self.known: dict[Any, float | None] = {}

    def tile(self, target: str, layout: Layout) -> Tile:
        """The tile that is taken under a mask."""
        tiles = choose_tiles(target, 128, 128, jnp.bfloat16).sized(layout)
        return tiles.forward if self.kernel == "forward" else tiles.gradients

    def estimate(self, tile: Tile, cells: Cells | None) -> float | None:
        """Cycles of a tile that shows these cells, or all."""
        if (tile, cells) not in self.known:
            count = max(4, 8192 // tile.block_kv)
            length = count * tile.block_kv
            job = {"kernel": self.kernel, "backward": self.kernel != "forward", "shape": (1, length, 1, 128)}
            job |= {"tile": astuple(tile), **({"name": "edge", "cells": cells} if cells else {"name": "full"})}
            found = self.cycles(**job)
            self.known[tile, cells] = None if found is None else found / (length // tile.block_q) / count
        return self.known[tile, cells]

    def total(self, mask: Mask, target: str) -> tuple[float | None, str]:
        """Cycles for a pair that full causal attention has, and the tile's size."""
        tile = self.tile(target, Layout(mask, TOKENS, TOKENS, own_keys=True, packed=False))
        length = TOKENS // tile.block_kv * tile.block_kv
        layout = Layout(mask, length, length, own_keys=True, packed=False)
        known, near = banded_edges(layout, tile.block_q, tile.block_kv), layout.near(tile.block_q, tile.block_kv)
        if self.by_cells:
            sizes = [replace(tile, block_q=n, block_kv=n) for n in (512, 1024)]
            each = [self.estimate(size, None) for size in sizes]
            if None in each:
                return None, ""
            a_cell = (each[1] - each[0]) / 48
            total = a_cell * known.num_cells + (each[1] - 64 * a_cell) * known.steps
        else:
            of_order = [(int((known.kinds[near] == kind).sum()), cells) for kind, cells in enumerate(known.cells, FIRST_EDGE)]
            whole = known.steps - sum(n for n, _ in of_order)
            each = [(n, self.estimate(tile, cells)) for n, cells in [*of_order, *[(whole, None)] * (whole > 0)]]
            if None in [cost for _, cost in each]:
                return None, ""
            total = sum(n * cost for n, cost in each)
        return total / (length * (length + 1) / 2), f"{tile.block_q} x {tile.block_kv}"


def density(mask: Mask) -> float:
    """Of causal pairs, what a mask shows."""
    number = np.arange(TOKENS)
    if isinstance(mask, PowerMask):
        back = np.arange(TOKENS // mask.block_size)
        blocks = sum((n & (n - 1)) == 0 for i in back for n in range(i + 1))
        pairs = (blocks - len(back) / 2) * mask.block_size**2
    else:
        pairs = np.minimum(number + 1, mask.window_size).sum()
    return float(pairs / (TOKENS * (TOKENS + 1) / 2))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="v5e", choices=tpu_static.TOPOLOGY)
    parser.add_argument("--only", default="tiles,masks,visits,choosing")
    parser.add_argument("--timeout", type=int, default=600, help="seconds an estimate")
    args = parser.parse_args()

    def cycles(**job: Any) -> int | None:
        job = {"target": args.target, "op": "attention", "shape": (1, LENGTH, 1, 128), "dtype": "bfloat16", "tile": None} | job
        found = tpu_static._run(job, args.timeout)["kernels"]
        return None if found is None else sum(found.values())

    def show(what: str, *values: float | None) -> None:
        print(f"{what:44}", *(f"{'-' if x is None else f'{x:,.0f}':>12}" for x in values), flush=True)

    only = args.only.split(",")
    if "tiles" in only:
        print(f"{args.target}, a tile: queries and keys, all visible, all masked, edge, no work")
        for kernel in tpu_static.KERNELS:
            kinds = ({"name": "full"}, {"name": "masked"}, {"name": "edge", "cells": DIAGONAL}, {"name": "skip"})
            found = (cycles(kernel=kernel, backward=kernel != "forward", **kind) for kind in kinds)
            tile = getattr(choose_tiles(args.target, 128, 128, jnp.bfloat16), "forward" if kernel == "forward" else "gradients")
            count = (LENGTH // tile.block_q) * (LENGTH // tile.block_kv)
            show(f"{kernel}, {tile.block_q} by {tile.block_kv}", *(None if x is None else x / count for x in found))
    blind = args.target in ("v5e", "v5p")
    if "masks" in only:
        print(f"{args.target}, {TOKENS} tokens: tiles, and of the promised speed-up forward, gradients, both")
        kernels = [Masked(kernel, cycles, by_cells=blind and kernel != "forward") for kernel in tpu_static.KERNELS]
        full = [kernel.total(Mask(), args.target)[0] for kernel in kernels]
        for what, mask in MASKS.items():
            each, sizes = zip(*(kernel.total(mask, args.target) for kernel in kernels), strict=True)
            pairs = [(sum(full), sum(each))] if None not in (*full, *each) else []
            shares = [
                "-" if None in pair else f"{density(mask) * pair[0] / pair[1]:.0%}"
                for pair in [*zip(full, each, strict=True), *pairs]
            ]
            print(f"{what:24} {density(mask):8.4f} {', '.join(sizes):>26}", *(f"{share:>6}" for share in shares), flush=True)
    if "visits" in only:
        print(
            f"{args.target}, a visit: under the mask, where the choice alone hides keys, after such a tile the diagonal, the diagonal alone"
        )
        for cut in CUTS:
            for kernel in ("forward", "all_gradients"):
                names = ["open" if blind and kernel != "forward" else "selected"]
                names += ["chosen", "last", "edge"] if cut[0] >= cut[3] >= 128 and names[0] != "open" else []
                each = []
                for name in names:
                    ends = [cycles(kernel=kernel, backward=True, name=name, cut=cut, visits=n) for n in VISITS]
                    each.append(None if None in ends else (ends[1] - ends[0]) / (VISITS[1] - VISITS[0]))  # type: ignore[operator]
                show("{1} heads, {2} queries, {3} keys, ".format(*cut) + kernel, *each)
    if "choosing" in only:
        print(f"{args.target}, choosing of 32,768 queries of 16 heads: XLA's part")
        for name in ("chunked", "pallas_tpu"):
            job = {"target": args.target, "op": "choosing", "dtype": "bfloat16", "name": name, "profile": False}
            show(f"NSA, {name}", tpu_static._run(job, args.timeout)["others"])
        show("MoBA, chunked", tpu_static._run(job | {"name": "chunked", "each": True}, args.timeout)["others"])


if __name__ == "__main__":
    main()
