"""How far the work of the TPU attention kernels follows the density that a mask, selected blocks or routed heads promise.

    python benchmarks/sparsity.py [--seq-len 32768]

No kernel runs. Under masks, in packed rows and with routed heads it counts the cells of 128 by 128 pairs that the forward kernel is told to
compute, and its steps; with routed heads a step counts as `Tile.step` cells. Tiles are those of v5e. Of masks `sparse_static.py` has
cycles. Where blocks are selected, tiles count by v5e's static estimates for head dim 128, as that gives them too. The promised work is the
density of visible pairs times that of full causal attention. Documents, routed heads and selected blocks are drawn at random, blocks by a run
of queries together or by each query apart.
"""

from __future__ import annotations

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels import Mask, PowerMask, SelectedBlocks, Tokens
from plait.kernels.attention.pallas_tpu import choose_tiles
from plait.kernels.attention.tpu.best_tiles import SELECTED
from plait.kernels.attention.tpu.cut import Cut
from plait.kernels.attention.tpu.edges import CELL, FIRST_EDGE, edges
from plait.kernels.attention.tpu.rectangles import Rectangles
from plait.kernels.attention.tpu.tiling import Problem
from plait.kernels.attention.visits import FULL, MASKED, SKIP, Layout, tile_kinds
from plait.kernels.shapes import padded
from plait.train.verify.rooflines import PEAKS

TILES = choose_tiles("v5e", 128, 128, jnp.bfloat16)

CYCLES = {
    (1, 1024, 1024): ((5934, 10463), (4680, 10463), (3651, 10463 * 36 / 64)),
    (1, 512, 512): ((1780, 2759), (1327, 2759), (1447, 2759 * 10 / 16)),
    (1, 1024, 256): ((1721, 2757), (1265, 2757), (1680, 2757)),
    (1, 1024, 128): ((1075, 1510), (845, 1510), (1075, 1510)),
    (4, 256, 64): ((1033 / 2, 1510 / 2),),
    (16, 128, 64): ((1460 / 2, 2757 / 2),),
}
"""A tile's cycles by heads, queries and keys of it, two of 64 keys being fetched together: forward and all gradients, under the mask, where the
choice alone hides keys, and on the diagonal. Those of gradients are v5p's without a mask, with which there is no estimate, and of the diagonal
follow its cells."""

CAUSAL_TILE, CAUSAL_EDGES = (9513, 10912), ((3544, 10912 * 40 / 64), (7430, 10912 * 40 / 64))
"""Of full causal attention: a tile of 1,024 queries and 2,048 keys (of gradients 1,024), and one on the diagonal, at its beginning and in its
middle; that of gradients is by its cells."""


def sized(layout: Layout) -> tuple[int, int]:
    """Queries and keys of the tiles under a layout."""
    tile = TILES.sized(layout).forward
    return tile.block_q, tile.block_kv


def counted(queries: Tokens, length: int, block: int) -> float:
    """Cells of work of each query head that `queries` [1, H, T] have, in square tiles."""
    keys = Tokens(None, jnp.ones((1, 1, length), jnp.int32), jnp.arange(length, dtype=jnp.int32)[None, None])
    layout = Layout(Mask(), length, length, own_keys=False, packed=True)
    kinds = np.asarray(tile_kinds(layout, queries, keys, block, block, keep_first=False))
    return float((kinds != SKIP).sum() * (TILES.forward.step + (block / CELL) ** 2) / kinds.shape[1])


def cycles(indices: np.ndarray, block_size: int, heads: int) -> tuple[tuple[int, int, int], np.ndarray]:
    """The cut, and the cycles of each kernel for a query head, where so many heads select the blocks [T, N] together."""
    length = len(indices)
    selected = SelectedBlocks(indices=jnp.asarray(indices)[None, :, None], block_size=block_size, num_blocks=length // block_size)
    cut = Cut.of((heads, 1), (length, length), selected, *SELECTED[2])
    everyone = Tokens(None, jnp.ones((1, 1, length), jnp.int32), jnp.arange(length, dtype=jnp.int32)[None, None])
    layout = Layout(Mask(), length, length, own_keys=True, packed=False)
    edge = Rectangles.under(Problem(layout, cut, 1.0, sigmoid=False, stats=False), forward=True).edge
    diagonal = MASKED if edge is None else np.where(edge.kinds == FIRST_EDGE, FIRST_EDGE, MASKED)
    options = {"keep_first": False, "selected": selected, "choice_alone": FULL, "masked": (diagonal, MASKED)}
    kinds = tile_kinds(layout, everyone, everyone, cut.queries, cut.keys, **options)
    shape = cut.heads, cut.queries, cut.keys
    visits = [int((kinds == kind).sum()) for kind in (MASKED, FULL, FIRST_EDGE)]
    copied = np.array([512, 512 + 2048]) * cut.keys * PEAKS["v5e"].clock / PEAKS["v5e"].bandwidth  # sums of keys both ways
    each = [np.maximum(of, copied) for of in CYCLES[shape]]  # copies run beside the work
    each += each[:1] * (len(visits) - len(each))
    return shape, sum(n * of for n, of in zip(visits, each, strict=True)) / cut.heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=32768)
    args = parser.parse_args()
    length, usual = args.seq_len, (TILES.forward.block_q, TILES.forward.block_kv)
    rng = np.random.default_rng(0)
    everyone = Tokens(None, jnp.ones((1, 1, length), jnp.int32), jnp.arange(length, dtype=jnp.int32)[None, None])
    causal = length * (length + 1) / 2

    def show(what: str, density: float, mask: Mask) -> None:
        layout = Layout(mask, length, length, own_keys=True, packed=False)
        tile = sized(layout)
        known = edges(layout, *tile)
        share = full.num_cells / known.num_cells * density
        print(
            f"{what:22} {density:8.4f} {1 / density:9.2f} {' x '.join(map(str, tile)):>12} {known.num_cells:6} {known.steps:6} {share:6.0%}"
        )

    full = edges(Layout(Mask(), length, length, own_keys=True, packed=False), *usual)
    print(f"T={length}, forward; full causal attention: tiles of {usual}, {full.num_cells} cells, {full.steps} steps")
    print(f"{'mask':22} {'density':>8} {'promised':>9} {'tiles':>12} {'cells':>6} {'steps':>6} {'share':>6}")
    for share in (0.25, 0.125, 0.0625):
        window = next(w for w in range(1024, length, CELL) if w * length - w * w / 2 >= share * causal)
        density = (window * length - window * (window - 1) / 2) / causal
        show(f"window {window}", density, Mask(window_size=window))
    for block in (1024, 512, 256):
        back = np.arange(length // block)
        blocks = sum((n & (n - 1)) == 0 for i in back for n in range(i + 1))
        density = (blocks - len(back) / 2) * block**2 / causal
        show(f"power, blocks of {block}", density, PowerMask(block_size=block))
    whole = float(counted(everyone, length, usual[0]))
    for share in (0.75, 0.5):
        active = rng.random((1, 4, length)) < share
        order = jnp.argsort(~jnp.asarray(active), axis=-1, stable=True)
        gather = lambda x, order=order: jnp.take_along_axis(jnp.broadcast_to(x, order.shape), order, axis=-1)
        routed = Tokens(None, gather(jnp.asarray(active).astype(jnp.int32)), gather(everyone.positions))
        work = counted(routed, length, usual[0]) / whole
        print(f"heads of {share:.0%} of queries: density {active.mean():.4f}, cells and steps {work:.4f} of all")
    show_packed(rng)
    show_selected(length, rng)


def show_packed(rng: np.random.Generator) -> None:
    """Prints the cells of packed rows, beside those of kernels that compute tiles of several documents whole."""
    print(f"\n{'packed rows':>11} {'documents':>9} {'window':>6} {'tiles':>11} {'cells':>6} {'whole tiles':>11}")
    rows = 16
    for length, mean, window in itertools.product((4096, 32768), (512, 1024, 4096), (None, 1024)):
        ids, at = np.zeros((2, rows, 1, length), np.int32)
        for row in range(rows):
            ends = np.cumsum(np.maximum(16, rng.exponential(mean, length // 16)).astype(int))
            begins = np.concatenate([[0], ends[ends < length]])
            ids[row, 0] = np.searchsorted(begins, np.arange(length), side="right")
            at[row, 0] = np.arange(length) - begins[ids[row, 0] - 1]
        layout = Layout(Mask(window_size=window), length, length, own_keys=True, packed=True)
        tile = sized(layout)
        tokens = [Tokens(None, *(padded(jnp.asarray(x), 2, each) for x in (ids, at))) for each in tile]
        known, whole = edges(layout, *tile), tile[0] * tile[1] // CELL**2
        kinds = np.asarray(tile_kinds(layout, *tokens, *tile, keep_first=False, masked=(known.kinds, known.of_several)))
        computed = {
            kind: sum(state > 0 for row in known.shown(kind)[0] for state in row) for kind in known.possible if kind >= FIRST_EDGE
        }
        cells = sum(int((kinds == kind).sum()) * computed.get(kind, whole) for kind in known.possible)
        more = sum(
            int((kinds == kind).sum()) * (whole - n) for kind, n in computed.items() if kind >= FIRST_EDGE + len(known.cells)
        )
        print(
            f"{length:11} {mean:9} {window or '':>6} {' x '.join(map(str, tile)):>11} {cells / rows:6.0f} {(cells + more) / rows:11.0f}"
        )


def show_selected(length: int, rng: np.random.Generator) -> None:
    """Prints what selected blocks cost: those of a query head by itself, as MoBA has them, and of a group, as NSA."""
    rows = [(row // np.array([2, 1]), CAUSAL_EDGES[row % 2]) for row in range(length // 1024)]
    full = sum(tiles * CAUSAL_TILE + edge for tiles, edge in rows)
    print(
        f"\n{'blocks':>6} {'top':>4} {'heads':>5} {'choose':>9} {'density':>8} {'tile':>14}  share of the promise by cycles, v5e:"
    )
    print(f"{'':52} forward, gradients, both")
    for heads, block, top in (
        (1, 1024, 8),
        (1, 1024, 3),
        (1, 512, 8),
        (1, 512, 3),
        (1, 256, 8),
        (1, 128, 16),
        (16, 64, 16),
        (4, 64, 16),
    ):
        for run in sorted({max(block, 128), block, 1}, reverse=True):
            number = np.arange(0, length, run) // block
            drawn = np.argsort(
                np.where(np.arange(length // block) < number[:, None], rng.random((len(number), length // block)), 2)
            )
            others = np.where(np.arange(top - 1) < number[:, None], drawn[:, : top - 1], -1)
            indices = np.repeat(np.concatenate([number[:, None], others], axis=1), run, axis=0).astype(np.int32)
            pairs = ((others >= 0).sum(1) * block).repeat(run).sum() + (np.arange(length) % block + 1).sum()
            density = pairs / (length * (length + 1) / 2)
            shape, cost = cycles(indices, block, heads)
            shares = ", ".join(f"{share:.0%}" for share in (*(full * density / cost), full.sum() * density / cost.sum()))
            who = "apart" if run == 1 else f"by {run}"
            print(f"{block:6} {top:4} {heads:5} {who:>9} {density:8.2%} {'x'.join(map(str, shape)):>14}  {shares}")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
