"""Static cycles of attention on TPU by length: forward and all gradients, causal and full, beside JAX's splash attention.

    python benchmarks/attention_lengths.py FILE [--targets v5e,v6e] [--head-dims 64,128,256]

Needs the extra `aot`. What is found is appended to FILE, a line of JSON an estimate; the same command goes on where it was ended. One head of
one sequence, bfloat16, thousands of cycles of a core; our tiles are those of `best_tiles.py`, splash's have 1,024 by 1,024. A kernel's control
is no part of an estimate, so each is compiled with every tile visible at two lengths, of which the difference is what a tile costs, and with
every tile on the diagonal, at its beginning and, where it has 2,048 keys, at its middle; a length is then what does not depend on it and its
tiles. Where a tile on the diagonal has no estimate, as on v5e and v5p in the gradients and in splash, which reads its mask from memory, it
counts as a visible one: those have a star.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import tpu_static
from sparse_static import DIAGONAL

from plait.kernels.attention.pallas_tpu import choose_tiles

QUERIES = 1024
"""Of a tile."""
LENGTHS = (2048, 8192, 32768)
SHORT, LONG = 2048, 4096
"""Compiled; all others follow from them."""

EDGES = ("edge", "middle")
KINDS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "edge": {"name": "edge", "cells": DIAGONAL},
    "middle": {"name": "edge", "cells": [[2] * 8] * 8 + DIAGONAL[:8]},
}


def main() -> None:
    """Estimates what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where estimates are kept, a line each")
    parser.add_argument("--targets", default=",".join(tpu_static.TOPOLOGY), help="generations")
    parser.add_argument("--head-dims", default="64,128,256")
    parser.add_argument("--timeout", type=int, default=600, help="seconds an estimate")
    args = parser.parse_args()
    args.file.touch()
    known = {tuple(key): cycles for key, cycles in map(json.loads, args.file.read_text().splitlines())}

    def cycles(target: str, width: int, kernel: str, kind: str, length: int) -> int | None:
        """Of one kernel in which every tile is of a kind; None where there is no estimate."""
        key = (target, width, kernel, kind, length)
        if key not in known:
            job = {"target": target, "op": "attention", "shape": (1, length, 1, width), "dtype": "bfloat16", "tile": None}
            job |= {"backward": kernel != "forward", "block": QUERIES}
            job |= KINDS[kind] | {"kernel": kernel} if kind in KINDS else {"name": "splash-fused"}
            found = tpu_static._run(job, args.timeout)["kernels"] or {}
            of = [n for name, n in found.items() if kind in KINDS or ("fwd" in name) == (kernel == "forward")]
            known[key] = sum(of) or None
            with args.file.open("a") as file:
                print(json.dumps([key, known[key]]), file=file)
        return known[key]

    def row(target: str, width: int, kernel: str, kind: str) -> list[str]:
        """Thousands of cycles of each length, full and causal."""
        tiles = choose_tiles(target, width, width, jnp.bfloat16)
        keys = (tiles.forward if kernel == "forward" else tiles.gradients).block_kv if kind == "full" else QUERIES
        short, long = (cycles(target, width, kernel, kind, length) for length in (SHORT, LONG))
        edges = [cycles(target, width, kernel, edge, SHORT) for edge in EDGES[: keys // QUERIES] if kind == "full"]
        full, causal = zip(*(_estimates(short, long, edges, keys, length) for length in LENGTHS), strict=True)
        words = ["no estimate" if n is None else f"{n / 1000:,.0f}" for n in (*full, *causal)]
        return words if edges and None not in edges else [*words[: len(LENGTHS)], *(word + "*" for word in words[len(LENGTHS) :])]

    titles = ("chip, head dim", "pass", *(f"{kind}, {length:,}" for kind in ("full", "causal") for length in LENGTHS))
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for target, width, kernel in itertools.product(
        args.targets.split(","), map(int, args.head_dims.split(",")), tpu_static.KERNELS
    ):
        cells = (
            " / ".join(pair) for pair in zip(*(row(target, width, kernel, kind) for kind in ("full", "splash")), strict=True)
        )
        print(f"| {target}, {width} | {kernel.replace('_', ' ')} | {' | '.join(cells)} |", flush=True)


def _estimates(
    short: int | None, long: int | None, edges: list[int | None], keys: int, length: int
) -> tuple[float | None, float | None]:
    """Cycles of a square of tiles of so many keys and of its lower half; `edges` are the squares of `SHORT` of tiles on the diagonal, each of
    which counts as a visible one where that is None."""
    if short is None or long is None:
        return None, None
    count = lambda length: (length // QUERIES) * (length // keys)
    tile = (long - short) / (count(LONG) - count(SHORT))
    fixed = short - count(SHORT) * tile
    on_diagonal = [tile if edge is None else (edge - fixed) / count(SHORT) for edge in edges or [None]]
    rows = [divmod(row * QUERIES, keys) for row in range(length // QUERIES)]
    causal = sum(before * tile + on_diagonal[rest // QUERIES] for before, rest in rows)
    return fixed + count(length) * tile, fixed + causal


if __name__ == "__main__":
    main()
