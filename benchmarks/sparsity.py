"""How far the work of the TPU attention kernels follows the density that a mask, packed rows or routed heads promise.

    python benchmarks/sparsity.py [--seq-len 32768]

No kernel runs. It counts the cells of 128 by 128 pairs that the forward kernel is told to compute, and its steps; with routed heads a step
counts as `Tile.step` cells. Tiles are those of v5e. Of masks, and where blocks are selected, `sparse_static.py` has cycles. The promised work
is the density of visible pairs times that of full causal attention. Documents and routed heads are drawn at random.
"""

from __future__ import annotations

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels import Mask, PowerMask, Tokens
from plait.kernels.attention.pallas_tpu import choose_tiles
from plait.kernels.attention.tpu.edges import CELL, FIRST_EDGE, edges
from plait.kernels.attention.visits import SKIP, Layout, tile_kinds
from plait.kernels.shapes import padded

TILES = choose_tiles("v5e", 128, 128, jnp.bfloat16)


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


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
