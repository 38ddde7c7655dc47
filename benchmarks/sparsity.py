"""How far the work of the TPU attention kernel follows the density that a mask, selected blocks or routed heads promise.

    python benchmarks/sparsity.py [--seq-len 32768] [--generation v5e]

Counts the cells of 128 by 128 pairs that the kernel is told to compute, on the CPU, and adds to each tile the cells whose cycles a step
costs (`STEP` in `kernels/attention/tpu/size.py`, from the compiler's static estimates); no kernel runs. That a cell under the mask costs
more, or one of a short row of them, is not counted. The promised work is the density of visible pairs times that of full causal attention.
Selected blocks and routed heads are drawn at random, the worst case for both; a tile has 128 queries where blocks are selected.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels import Mask, PowerMask, SelectedBlocks, Tokens
from plait.kernels.attention.pallas_tpu import choose_tiles
from plait.kernels.attention.tpu import size
from plait.kernels.attention.tpu.edges import CELL
from plait.kernels.attention.visits import SKIP, Layout, tile_kinds


def counted(
    queries: Tokens, length: int, blocks: tuple[int, int], *, own: bool = True, selected: SelectedBlocks | None = None
) -> float:
    """Cells of work of each query head that `queries` [1, H, T] or the selection have, in tiles of `blocks` queries and keys."""
    keys = Tokens(None, jnp.ones((1, 1, length), jnp.int32), jnp.arange(length, dtype=jnp.int32)[None, None])
    layout = Layout(Mask(), length, length, own_keys=own, packed=not own)
    kinds = np.asarray(tile_kinds(layout, queries, keys, *blocks, keep_first=False, selected=selected))
    return float((kinds != SKIP).sum() * (size.STEP + blocks[0] * blocks[1] / CELL**2) / kinds.shape[1])


def under(mask: Mask, length: int, usual: int) -> float:
    """Cells of work under a mask, in tiles of the size that the kernel takes."""
    layout = Layout(mask, length, length, own_keys=True, packed=False)
    return size.work(layout, size.least(layout, usual))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--generation", default="v5e")
    args = parser.parse_args()
    length, tile = args.seq_len, choose_tiles(args.generation, 128, 128, jnp.bfloat16).forward.block_q
    rng = np.random.default_rng(0)
    everyone = Tokens(None, jnp.ones((1, 1, length), jnp.int32), jnp.arange(length, dtype=jnp.int32)[None, None])
    causal = length * (length + 1) / 2
    full = under(Mask(), length, tile)
    print(
        f"T={length}, tiles of {tile}; full causal attention: {full * CELL**2 / causal:.2f} of its visible pairs, steps included"
    )
    print(f"{'what':38} {'density':>8} {'work':>7} {'speed-up':>9} {'promised':>9} {'share':>6}")

    def show(what: str, density: float, cost: float) -> None:
        print(f"{what:38} {density:8.4f} {cost / full:7.4f} {full / cost:9.2f} {1 / density:9.2f} {full / cost * density:6.0%}")

    for share in (0.25, 0.125, 0.0625):
        window = next(w for w in range(tile, length, tile // 8) if w * length - w * w / 2 >= share * causal)
        density = (window * length - window * (window - 1) / 2) / causal
        show(f"window {window}", density, under(Mask(window_size=window), length, tile))
    for block in (1024, 512, 256):
        rule = PowerMask(block_size=block)
        back = np.arange(length // block)
        blocks = sum((n & (n - 1)) == 0 for i in back for n in range(i + 1))
        density = (blocks - len(back) / 2) * block**2 / causal
        show(f"power, blocks of {block}", density, under(rule, length, tile))
    for block in (1024, 512, 256, 128):
        count = length // block
        for share in (0.25, 0.125, 0.0625):
            indices = np.full((count, max(1, round(share * count))), -1, np.int32)
            for i in range(count):
                keep = max(1, round(share * (i + 1)))
                indices[i, :keep] = [i, *rng.choice(i, keep - 1, replace=False)]
            density = ((indices >= 0).sum() - count / 2) * block**2 / causal
            together = jnp.repeat(jnp.asarray(indices), block, axis=0)[None, :, None]  # a block of queries selects as one
            selected = SelectedBlocks(indices=together, block_size=block, num_blocks=count)
            show(f"top-k of blocks of {block}", density, counted(everyone, length, (CELL, min(tile, block)), selected=selected))
    for share in (0.75, 0.5):
        active = rng.random((1, 4, length)) < share
        order = jnp.argsort(~jnp.asarray(active), axis=-1, stable=True)
        gather = lambda x, order=order: jnp.take_along_axis(jnp.broadcast_to(x, order.shape), order, axis=-1)
        routed = Tokens(None, gather(jnp.asarray(active).astype(jnp.int32)), gather(everyone.positions))
        show(f"routed heads, {share:.0%} of queries", active.mean(), counted(routed, length, (tile, tile), own=False))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
