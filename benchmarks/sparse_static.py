"""Static cycles of what sparse attention on TPU is made of: tiles under a mask, visits where blocks are selected, and choosing.

    python benchmarks/sparse_static.py [--target v5e] [--only tiles,visits,choosing]

Needs the extra `aot`. Cycles are the compiler's estimates (`tpu_static.py`), one head dim, 128, in bfloat16; a kernel that it has none for is
"-". Tiles are those of a row of 8 by 8, and an edge is a tile on the diagonal. A visit is what one more costs a loop. Of key gradients under a
mask v5e and v5p have no estimate: gradients are estimated without one there. Of choosing, XLA's estimates of all but kernels are given.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax.numpy as jnp
import tpu_static

from plait.kernels.attention.pallas_tpu import choose_tiles

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

DIAGONAL = [[0 if query < key else 1 + (query > key) for query in range(8)] for key in range(16)]
"""Of each 128 of 2,048 keys what order shows to 128 of the first 1,024 queries: nothing, some, all. A tile of fewer keys has the first rows."""


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="v5e", choices=tpu_static.TOPOLOGY)
    parser.add_argument("--only", default="tiles,visits,choosing")
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
    if "visits" in only:
        print(
            f"{args.target}, a visit: forward under the mask, where the choice alone hides keys, on the diagonal, all gradients"
        )
        blind = args.target in ("v5e", "v5p")
        for cut in CUTS:
            kinds = [
                ("forward", "selected"),
                *[("forward", "chosen"), ("forward", "edge")] * (cut[0] >= cut[3] >= 128),
                ("all_gradients", "open" if blind else "selected"),
            ]
            each = []
            for kernel, name in kinds:
                ends = [cycles(kernel=kernel, backward=True, name=name, cut=cut, visits=n) for n in VISITS]
                each.append(None if None in ends else (ends[1] - ends[0]) / (VISITS[1] - VISITS[0]))  # type: ignore[operator]
            show("{1} heads, {2} queries, {3} keys".format(*cut), *each[:1], *(each[1:-1] or [None, None]), each[-1])
    if "choosing" in only:
        print(f"{args.target}, choosing of 32,768 queries of 16 heads: XLA's part")
        for name in ("chunked", "pallas_tpu"):
            job = {"target": args.target, "op": "choosing", "dtype": "bfloat16", "name": name, "profile": False}
            show(f"NSA, {name}", tpu_static._run(job, args.timeout)["others"])
        show("MoBA, chunked", tpu_static._run(job | {"name": "chunked", "each": True}, args.timeout)["others"])


if __name__ == "__main__":
    main()
