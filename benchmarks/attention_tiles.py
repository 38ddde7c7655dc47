"""Searches the tiles of TPU attention by the compiler's static cycles; `kernels/attention/tpu/best_tiles.py` is made of the best.

python benchmarks/attention_tiles.py FILE

Needs the extra `aot`. What is found is appended to FILE, a line of JSON an estimate; the same command goes on where it was ended. Tiles and
their parts are estimated with every tile visible, those that take the fewest cycles at twice the length too: the best are those that grow
least. Parts of an edge are estimated with every tile on the diagonal of a causal mask. bfloat16; a chip that is at hand should be asked for
times instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
from functools import partial
from pathlib import Path

import tpu_static
from sparse_static import DIAGONAL

LENGTH = 2048
FINALISTS = 4
TILES = {"forward": ((1024, 1024), (1024, 2048)), "all_gradients": ((1024, 1024),)}
PARTS = {
    "forward": ((1024, 1024), (512, 1024), (256, 1024), (1024, 512), (512, 512), (256, 512), (256, 256), (128, 128)),
    "all_gradients": ((1024, 1024), (256, 1024), (512, 1024), (1024, 256), (1024, 512), (512, 512), (256, 256)),
}
EDGES = ((1024, 256), (1024, 128), (512, 512), (512, 256), (512, 128), (256, 512), (256, 256), (256, 128), (128, 128))
"""Queries and keys of a tile, of a part of it, and of a part of one on the diagonal."""


def main() -> None:
    """Estimates what is missing, and prints what is best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where estimates are kept, a line each")
    parser.add_argument("--targets", default=",".join(tpu_static.TOPOLOGY), help="generations")
    parser.add_argument("--head-dims", default="64,128,256")
    parser.add_argument("--kernels", default=",".join(PARTS))
    parser.add_argument("--timeout", type=int, default=600, help="seconds an estimate")
    args = parser.parse_args()
    args.file.touch()
    known = {tuple(key): cycles for key, cycles in map(json.loads, args.file.read_text().splitlines())}

    def cycles(target: str, width: int, kernel: str, kind: str, length: int, *tile: int) -> float:
        """Infinite where there is no estimate."""
        key = (target, width, kernel, kind, length, *tile)
        if key not in known:
            job = {"target": target, "op": "attention", "shape": (1, length, 1, width), "dtype": "bfloat16", "cells": DIAGONAL}
            more = {"backward": kernel != "forward", "name": kind, "kernel": kernel, "tile": tile}
            found = tpu_static._run(job | more, args.timeout)["kernels"]
            known[key] = None if found is None else sum(found.values())
            with args.file.open("a") as file:
                print(json.dumps([key, known[key]]), file=file)
        return float("inf") if known[key] is None else known[key]

    for target, width in itertools.product(args.targets.split(","), map(int, args.head_dims.split(","))):
        for kernel in args.kernels.split(","):
            of = partial(cycles, target, width, kernel)
            tiles = [(*tile, *part) for tile, part in itertools.product(TILES[kernel], PARTS[kernel])]
            short = {tile: of("full", LENGTH, *tile) for tile in tiles}
            finalists = sorted(tiles, key=short.__getitem__)[:FINALISTS]
            growth = {tile: (of("full", 2 * LENGTH, *tile) - short[tile]) / (3 * LENGTH**2 / 1024**2) for tile in finalists}
            best = min(finalists, key=growth.__getitem__)
            edges = {edge: of("edge", LENGTH, 1024, 1024, 1024, 1024, *edge) / (LENGTH / 1024) ** 2 for edge in EDGES}
            edge = min(EDGES, key=edges.__getitem__)
            costs = f"{growth[best]:,.0f} and {edges[edge]:,.0f} cycles of 1,024 squared"
            print(f"{target}, {width}, {kernel}: Tile{(*best, *edge)}  # {costs}", flush=True)


if __name__ == "__main__":
    main()
