"""Searches the tiles of TPU attention by the compiler's static cycles; `kernels/attention/tpu/best_tiles.py` is made of the best.

python benchmarks/attention_tiles.py FILE

Needs the extra `aot`. What is found is appended to FILE, a line of JSON an estimate; the same command goes on where it was ended. Tiles and
their parts are estimated with every tile visible, and parts of an edge with every tile on the diagonal of a causal mask: those that take the
fewest cycles for a query and a key are the best. bfloat16; a chip that is at hand should be asked for times instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import tpu_static
from sparse_static import DIAGONAL

LENGTH = 2048
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

    def cycles(target: str, width: int, kernel: str, kind: str, *tile: int) -> float:
        """For a query and a key; infinite where there is no estimate."""
        key = (target, width, kernel, kind, *tile)
        if key not in known:
            job = {"target": target, "op": "attention", "shape": (1, LENGTH, 1, width), "dtype": "bfloat16", "cells": DIAGONAL}
            more = {"backward": kernel != "forward", "name": kind, "kernel": kernel, "tile": tile}
            found = tpu_static._run(job | more, args.timeout)["kernels"]
            known[key] = None if found is None else sum(found.values())
            with args.file.open("a") as file:
                print(json.dumps([key, known[key]]), file=file)
        total = known[key]
        return float("inf") if total is None else total / LENGTH**2

    for target, width in itertools.product(args.targets.split(","), map(int, args.head_dims.split(","))):
        for kernel in args.kernels.split(","):
            tiles = [(*tile, *part) for tile, part in itertools.product(TILES[kernel], PARTS[kernel])]
            order = lambda kind, tile: cycles(target, width, kernel, kind, *tile)  # noqa: B023  (used at once)
            best = min(tiles, key=lambda tile: order("full", tile))
            edges = {edge: order("edge", (1024, 1024, 1024, 1024, *edge)) for edge in EDGES}
            edge = min(EDGES, key=edges.__getitem__)
            costs = order("full", best) * 2**20, edges[edge] * 2**20
            print(
                f"{target}, {width}, {kernel}: Tile{(*best, *edge)}  # {costs[0]:,.0f} and {costs[1]:,.0f} cycles of 1,024 squared",
                flush=True,
            )


if __name__ == "__main__":
    main()
