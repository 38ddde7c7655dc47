"""Static cycles of what sparse attention on TPU is made of: tiles under a mask, visits where blocks are selected, and choosing.

    python benchmarks/sparse_static.py [--target v5e] [--only tiles,masks,visits,choosing] [--visits 33 65] [--blocks 1024 512]

Needs the extra `aot`. Cycles are the compiler's estimates (`tpu_static.py`), one head dim, 128, in bfloat16; a kernel that it has none for is
"-". Tiles are those of a row of 8 by 8, and an edge is a tile on the diagonal. Masks are those of windows and PowerAttention in the tiles that
the kernels take, each kind compiled; shares are of the speed-up over full causal attention that their density promises. A visit is what one
more costs a loop, by the kinds of the tiles in it, and a step what the queries of a tile cost besides; from them and full causal attention
follow the shares where blocks are selected at random, by runs of queries together or by each query apart. A visit of gradients takes the
cycles of its work or those of its copies of key sums at the chip's bandwidth, whichever are more.
Of key gradients under a mask v5e and v5p have no estimate: gradients are estimated without one there, and those of masks by the cells of their
tiles. Of choosing, XLA's estimates of all but kernels are given.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from dataclasses import astuple, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tpu_static

from plait.kernels import Mask, PowerMask, SelectedBlocks, Tokens
from plait.kernels.attention.pallas_tpu import choose_tiles
from plait.kernels.attention.tpu.bands import banded_edges
from plait.kernels.attention.tpu.best_tiles import SELECTED
from plait.kernels.attention.tpu.cut import Cut
from plait.kernels.attention.tpu.edges import CELL, FIRST_EDGE, Cells
from plait.kernels.attention.tpu.key_sums import resident_bytes
from plait.kernels.attention.tpu.rectangles import Rectangles
from plait.kernels.attention.tpu.tiling import Problem, Tile
from plait.kernels.attention.visits import FULL, MASKED, SKIP, Layout, ordered, tile_kinds
from plait.kernels.chips import CHIPS

LENGTH = 8192
"""Of the square of tiles."""

CHOICES = (
    (1, 1024, 8),
    (1, 1024, 3),
    (1, 512, 8),
    (1, 512, 3),
    (1, 256, 8),
    (1, 128, 16),
    (16, 64, 16),
    (4, 64, 16),
)
"""Heads that choose together, keys of a block, blocks of a query."""

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


class Visits:
    """What one kernel takes where blocks are selected."""

    def __init__(self, target: str, kernel: str, lists: tuple[int, int], cycles: Callable[..., int | None], *, blind: bool):
        """`cycles` of a job; `blind` has none of gradients under a mask."""
        self.target, self.kernel, self.lists, self.cycles = target, kernel, lists, cycles
        self.blind = blind and kernel != "forward"
        self.known: dict[Any, float | None] = {}

    def _run(self, cut: Cut, name: str, length: int, **more: int) -> int | None:
        job = {"kernel": self.kernel, "backward": True, "name": name, "open": self.blind}
        return self.cycles(**job, cut=astuple(cut), visits=length, longest=self.lists[1], **more) or None

    def _visit(self, cut: Cut, name: str) -> float | None:
        short, long = (self._run(cut, name, length) for length in self.lists)
        return None if short is None or long is None else (long - short) / (self.lists[1] - self.lists[0])

    def _step(self, cut: Cut) -> float | None:
        name, short = "selected" if cut.block_size < cut.keys else "chosen" if cut.visited > 1 else "one", self.lists[0]
        visit, one = self.estimate(cut, name), self._run(cut, name, short)
        more = ({"steps": 2}, {"batch": 2})  # not each kernel has an estimate of both
        two = next(filter(None, (self._run(cut, name, short, **of) for of in more)), None)
        return None if visit is None or one is None or two is None else two - one - short * visit

    def estimate(self, cut: Cut, name: str) -> float | None:
        """Of a visit by its name in `tpu_static.visit_kinds`, or of what a step takes besides ("step")."""
        if (cut, name) not in self.known:
            if name == "step":
                found = self._step(cut)
            elif self.blind and name == "edge":  # by its cells
                rows, columns = cut.queries // CELL, cut.keys // CELL
                shown = sum(query >= key for query in range(rows) for key in range(columns)) / (rows * columns)
                found = self.estimate(cut, "one")
                found = None if found is None else found * shown
            elif self.blind and name not in ("one", "chosen"):
                found = self.estimate(cut, "chosen")
            else:
                found = self._visit(cut, name)
            self.known[cut, name] = found
        return self.known[cut, name]

    def total(self, cut: Cut, counts: dict[str, int]) -> float | None:
        """Of the visits that have been counted."""
        each = {name: self.estimate(cut, name) for name in counts}
        if None in each.values():
            return None
        copied = self._copied(cut)
        least = {name: {"step": 0, "one": 1, "edge": 1}.get(name, cut.visited) * copied for name in counts}
        return sum(n * max(each[name], least[name]) for name, n in counts.items())

    def _copied(self, cut: Cut) -> float:
        """Cycles in which sums of a tile of keys come and go."""
        chip = CHIPS[self.target]
        tiles, tile = TOKENS // cut.keys, (cut.keys, 256)
        if self.kernel == "forward" or resident_bytes(cut.heads * cut.queries, tiles, tile, chip.vector_memory):
            return 0.0
        return 2 * 4 * cut.keys * 256 * chip.clock / (chip.memory_bandwidth / chip.cores)


def drawn(block: int, top: int, run: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Blocks [T, top] that queries choose, their own and others at random, so many neighbours together; and the density of the pairs."""
    number, own = np.arange(0, TOKENS, run) // block, np.arange(TOKENS) // block
    order = np.argsort(np.where(np.arange(TOKENS // block) < number[:, None], rng.random((len(number), TOKENS // block)), 2))
    others = np.where(np.arange(top - 1) < number[:, None], order[:, : top - 1], -1)
    indices = np.concatenate([own[:, None], np.repeat(others, run, axis=0)], axis=1).astype(np.int32)
    pairs = ((others >= 0).sum(1) * block).repeat(run).sum() + (np.arange(TOKENS) % block + 1).sum()
    return indices, float(pairs / (TOKENS * (TOKENS + 1) / 2))


def visited(indices: np.ndarray, block: int, heads: int, *, wide: bool) -> tuple[Cut, dict[str, int]]:
    """The cut where so many heads select the blocks [T, N] together, and how many visits of each kind and steps there are."""
    selected = SelectedBlocks(indices=jnp.asarray(indices)[None, :, None], block_size=block, num_blocks=TOKENS // block)
    cut = Cut.of((heads, 1), (TOKENS, TOKENS), selected, *SELECTED[2], wide=wide)
    everyone = Tokens(None, jnp.ones((1, 1, TOKENS), jnp.int32), jnp.arange(TOKENS, dtype=jnp.int32)[None, None])
    layout = Layout(Mask(), TOKENS, TOKENS, own_keys=True, packed=False)
    rectangles = Rectangles.under(Problem(layout, cut, 1.0, sigmoid=False, stats=False), forward=True)
    edge, known = rectangles.edge, rectangles.kinds(cut.visited)
    names = {kinds: name for name, kinds in tpu_static.visit_kinds(cut).items()}
    diagonal = MASKED if edge is None else np.where(edge.kinds == FIRST_EDGE, FIRST_EDGE, MASKED)
    options = {"keep_first": False, "selected": selected, "choice_alone": FULL, "masked": (diagonal, MASKED)}
    kinds = np.asarray(tile_kinds(layout, everyone, everyone, cut.queries, cut.keys, **options))[0, 0]
    counts: dict[str, int] = {"step": len(kinds)}
    for row in np.asarray(ordered(jnp.asarray(kinds)[None, None], kinds.shape[1], late=FULL).entries)[0, 0] & 3:
        some = [int(kind) for kind in row if kind != SKIP]
        for n in range(0, len(some), cut.visited):
            these = tuple(some[n : n + cut.visited] + [SKIP] * (n + cut.visited - len(some)))
            name = names[next(kinds for kinds in known if Rectangles.fit(kinds, these))]
            counts[name] = counts.get(name, 0) + 1
    return cut, counts


def show_visits(
    target: str, lists: tuple[int, int], blocks: Collection[int], cycles: Callable[..., int | None], *, blind: bool
) -> None:
    """Prints shares of what chosen blocks of these sizes promise, and the cycles that they are made of."""
    kernels = [Visits(target, kernel, lists, cycles, blind=blind) for kernel in ("forward", "all_gradients")]
    masked = [Masked(kernel, cycles, by_cells=blind and kernel != "forward") for kernel in tpu_static.KERNELS]
    of_pairs = [kernel.total(Mask(), target)[0] for kernel in masked]
    full = [None if x is None else x * TOKENS * (TOKENS + 1) / 2 for x in of_pairs]
    print(f"{target}, {TOKENS} tokens, full causal attention:", *("-" if x is None else f"{x:,.0f}" for x in full))
    print("blocks, top, heads together, choose, density, tile; of the promised speed-up forward, gradients, both")
    for heads, block, top in (choice for choice in CHOICES if choice[1] in blocks):
        rng = np.random.default_rng((heads, block, top))
        for run in sorted({max(block, 128), block, 1}, reverse=True):
            indices, density = drawn(block, top, run, rng)
            cut, counts = visited(indices, block, heads, wide=CHIPS[target].matrix_unit == 256)
            each = [kernel.total(cut, counts) for kernel in kernels]
            promised = [None if x is None else density * heads * x for x in full]
            both = [*zip(promised, each, strict=True)]
            both.append((None, None) if None in (*promised, *each) else (sum(promised), sum(each)))
            shares = ["-" if None in pair else f"{pair[0] / pair[1]:.0%}" for pair in both]
            what = f"{block:5} {top:3} {heads:3} {'apart' if run == 1 else f'{run} together':>14} {density:8.2%}"
            print(f"{what} {cut.heads:3} x {cut.queries} x {cut.keys}", *(f"{x:>5}" for x in shares), counts, flush=True)
    for kernel in kernels:
        for (cut, name), cost in kernel.known.items():
            shape = f"{cut.heads} heads, {cut.queries} queries, {cut.visited} x {cut.keys} keys"
            print(
                f"{shape:44} {kernel.kernel:14} {name:9}",
                "-" if cost is None else f"{cost:8,.0f}",
                flush=True,
            )


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="v5e", choices=tpu_static.TOPOLOGY)
    parser.add_argument("--only", default="tiles,masks,visits,choosing")
    parser.add_argument("--visits", type=int, nargs=2, default=(33, 65), help="lengths of lists that estimates are of")
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=sorted({of[1] for of in CHOICES}), help="sizes that visits are of"
    )
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
        show_visits(args.target, tuple(args.visits), args.blocks, cycles, blind=blind)
    if "choosing" in only:
        print(f"{args.target}, choosing of 32,768 queries of 16 heads: XLA's part")
        for name in ("chunked", "pallas_tpu"):
            job = {"target": args.target, "op": "choosing", "dtype": "bfloat16", "name": name, "profile": False}
            show(f"NSA, {name}", tpu_static._run(job, args.timeout)["others"])
        show("MoBA, chunked", tpu_static._run(job | {"name": "chunked", "each": True}, args.timeout)["others"])


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
