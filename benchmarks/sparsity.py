"""How far the tiles that the TPU attention kernel visits follow the density that a mask, selected blocks or routed heads promise.

    python benchmarks/sparsity.py [--seq-len 32768] [--generation v5e]

Counts tiles in the tables of visits that the kernel is given, on the CPU; no kernel runs. Work is tiles visited, a tile under the mask
counted 1.36 times one wholly visible: the ratio of their statically estimated cycles (docs/benchmarks.md). The promised work is the
density of visible pairs times the causal square in whole tiles. Selected blocks and routed heads are drawn at random, the worst case
for both.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels import Mask, PowerMask, SelectedBlocks, Tokens
from plait.kernels.attention.pallas_tpu import choose_tiles
from plait.kernels.attention.visits import FULL, MASKED, Layout, plan_visits

MASKED_COST = 1.36


def work(
    mask: Mask, queries: Tokens, length: int, block: int, *, own: bool = True, selected: SelectedBlocks | None = None
) -> float:
    """Tiles' worth of work, in units of query-key pairs, of each query head that `queries` [1, H, T] or the selection have."""
    keys = Tokens(None, jnp.ones((1, 1, length), jnp.int32), jnp.arange(length, dtype=jnp.int32)[None, None])
    layout = Layout(mask, length, length, own_keys=own, packed=not own)
    by_query, _ = plan_visits(layout, queries, keys, block, block, keep_first=False, selected=selected)
    kinds = np.asarray(by_query.entries) & 3
    return float(((kinds == FULL).sum() + MASKED_COST * (kinds == MASKED).sum()) * block**2 / kinds.shape[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--generation", default="v5e")
    args = parser.parse_args()
    length, tile = args.seq_len, choose_tiles(args.generation, 128, 128, jnp.bfloat16).forward.block_q
    rng = np.random.default_rng(0)
    everyone = Tokens(None, jnp.ones((1, 1, length), jnp.int32), jnp.arange(length, dtype=jnp.int32)[None, None])
    causal = length * (length + 1) / 2
    full = work(Mask(), everyone, length, tile)
    print(f"T={length}, tiles of {tile}; full causal attention: {full / causal:.2f} of its visible pairs")
    print(f"{'what':38} {'density':>8} {'work':>7} {'speed-up':>9} {'promised':>9} {'share':>6}")

    def show(what: str, density: float, cost: float) -> None:
        print(f"{what:38} {density:8.4f} {cost / full:7.4f} {full / cost:9.2f} {1 / density:9.2f} {full / cost * density:6.0%}")

    for share in (0.25, 0.125, 0.0625):
        window = next(w for w in range(tile, length, tile // 8) if w * length - w * w / 2 >= share * causal)
        density = (window * length - window * (window - 1) / 2) / causal
        show(f"window {window}", density, work(Mask(window_size=window), everyone, length, tile if window > 4096 else 512))
    for block in (1024, 512, 256):
        rule = PowerMask(block_size=block)
        back = np.arange(length // block)
        blocks = sum((n & (n - 1)) == 0 for i in back for n in range(i + 1))
        density = (blocks - len(back) / 2) * block**2 / causal
        show(f"power, blocks of {block}", density, work(rule, everyone, length, min(tile, block)))
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
            show(f"top-k of blocks of {block}", density, work(Mask(), everyone, length, min(tile, block), selected=selected))
    for share in (0.75, 0.5):
        active = rng.random((1, 4, length)) < share
        order = jnp.argsort(~jnp.asarray(active), axis=-1, stable=True)
        gather = lambda x, order=order: jnp.take_along_axis(jnp.broadcast_to(x, order.shape), order, axis=-1)
        routed = Tokens(None, gather(jnp.asarray(active).astype(jnp.int32)), gather(everyone.positions))
        show(f"routed heads, {share:.0%} of queries", active.mean(), work(Mask(), routed, length, tile, own=False))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
