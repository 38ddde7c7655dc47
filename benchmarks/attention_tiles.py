"""Searches the tiles of TPU attention by the compiler's static cycles; `kernels/attention/tpu/best_tiles.py` is made of the best.

python benchmarks/attention_tiles.py FILE

Needs the extra `aot`. What is found is appended to FILE, a line of JSON an estimate; the same command goes on where it was ended. A kernel is
estimated with every tile visible, and the best two also with every tile masked; then the one with the fewest cycles over causal rows of 8,192
tokens is chosen, of which each row of tiles has one masked. bfloat16; a chip that is at hand should be asked for times instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tpu_static

LENGTH, CAUSAL = 2048, 8192
PARTS = {
    "forward": ((1024, 1024), (512, 1024), (1024, 512), (512, 512), (256, 256), (128, 128)),
    "all_gradients": ((1024, 1024), (256, 1024), (512, 1024), (1024, 256), (1024, 512), (512, 512), (256, 256)),
}
"""Queries and keys of a part of a tile of 1,024 by 1,024; those that fit are tried in one of 512 by 512 too."""


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

    def cycles(*key: Any) -> float:
        """Of one tile; infinite where the kernel does not compile."""
        if key not in known:
            target, width, kernel, kind, *tile = key
            job = {"target": target, "op": "attention", "shape": (1, LENGTH, 1, width), "dtype": "bfloat16"}
            more = {"backward": kernel != "forward", "name": kind, "kernel": kernel, "tile": tile}
            found = tpu_static._run(job | more, args.timeout)["kernels"]
            known[key] = None if found is None else sum(found.values())
            with args.file.open("a") as file:
                print(json.dumps([key, known[key]]), file=file)
        total = known[key]
        return float("inf") if total is None else total / (LENGTH // key[4]) / (LENGTH // key[5])

    def causal(*key: Any) -> float:
        """Of one row of keys and queries, forward and causal."""
        rows, (*of, block_q, block_kv, part_q, part_kv) = CAUSAL // key[3], key
        masked, full = (cycles(*of, kind, block_q, block_kv, part_q, part_kv) for kind in ("masked", "full"))
        masked = full if masked == float("inf") else masked  # a kernel that compiles may still have no estimate
        return rows * masked + rows * (rows - 1) / 2 * full

    for target, width in itertools.product(args.targets.split(","), map(int, args.head_dims.split(","))):
        print(f'    "{target}", {width}:')
        for kernel in args.kernels.split(","):
            tiles = list(_tiles(PARTS[kernel]))
            best = sorted(tiles, key=lambda tile: cycles(target, width, kernel, "full", *tile) / tile[0] / tile[1])[:2]
            chosen = min(best, key=lambda tile: causal(target, width, kernel, *tile))
            print(f"        {kernel}=Tile{chosen},  # {causal(target, width, kernel, *chosen):,.0f} cycles", flush=True)


def _tiles(parts: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int, int, int]]:
    for size in (1024, 512):
        yield from ((size, size, *part) for part in parts if max(part) <= size)


if __name__ == "__main__":
    main()
