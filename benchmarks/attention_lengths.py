"""Static cycles of attention on TPU by length: forward and all gradients, causal and full, beside JAX's splash attention.

    python benchmarks/attention_lengths.py FILE [--targets v5e,v6e] [--head-dims 64,128,256]

Needs the extra `aot`. What is found is appended to FILE, a line of JSON an estimate; the same command goes on where it was ended. One head of
one sequence, bfloat16, tiles of 1,024 by 1,024, thousands of cycles of a core. A kernel's control is no part of an estimate, so each is
compiled with every tile visible at two lengths, of which the difference is what a tile costs, and with every tile on the diagonal; a length is
then what does not depend on it and its tiles, those of a causal one being half the square and its diagonal. Where a tile on the diagonal has no
estimate, as on v5e and v5p in the gradients and in splash, which reads its mask from memory, it counts as a visible one: those have a star.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import tpu_static
from sparse_static import DIAGONAL

TILE = 1024
LENGTHS = (2048, 8192, 32768)
SHORT, LONG = 2048, 4096
"""Compiled; all others follow from them."""

KINDS: dict[str, dict[str, Any]] = {"full": {"name": "full"}, "edge": {"name": "edge", "cells": DIAGONAL}}


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
            job |= {"backward": kernel != "forward", "block": TILE}
            job |= KINDS[kind] | {"kernel": kernel} if kind in KINDS else {"name": "splash-fused"}
            found = tpu_static._run(job, args.timeout)["kernels"] or {}
            of = [n for name, n in found.items() if kind in KINDS or ("fwd" in name) == (kernel == "forward")]
            known[key] = sum(of) or None
            with args.file.open("a") as file:
                print(json.dumps([key, known[key]]), file=file)
        return known[key]

    def row(target: str, width: int, kernel: str, kind: str) -> list[str]:
        """Thousands of cycles of each length, full and causal."""
        short, long = (cycles(target, width, kernel, kind, length) for length in (SHORT, LONG))
        edge = cycles(target, width, kernel, "edge", SHORT) if kind == "full" else None
        full, causal = zip(*(_estimates(short, long, edge, length // TILE) for length in LENGTHS), strict=True)
        words = ["no estimate" if n is None else f"{n / 1000:,.0f}" for n in (*full, *causal)]
        return words if edge is not None else [*words[: len(LENGTHS)], *(word + "*" for word in words[len(LENGTHS) :])]

    titles = ("chip, head dim", "pass", *(f"{kind}, {length:,}" for kind in ("full", "causal") for length in LENGTHS))
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for target, width, kernel in itertools.product(
        args.targets.split(","), map(int, args.head_dims.split(",")), tpu_static.KERNELS
    ):
        cells = (
            " / ".join(pair) for pair in zip(*(row(target, width, kernel, kind) for kind in ("full", "splash")), strict=True)
        )
        print(f"| {target}, {width} | {kernel.replace('_', ' ')} | {' | '.join(cells)} |", flush=True)


def _estimates(short: int | None, long: int | None, edge: int | None, rows: int) -> tuple[float | None, float | None]:
    """Cycles of a square of tiles and of its lower half, of so many rows; `edge` is the square of `SHORT` of tiles on the diagonal, each of
    which counts as a visible one where that is None."""
    if short is None or long is None:
        return None, None
    few, many = (length // TILE for length in (SHORT, LONG))
    tile = (long - short) / (many**2 - few**2)
    fixed = short - few**2 * tile
    on_diagonal = tile if edge is None else (edge - fixed) / few**2
    return fixed + rows**2 * tile, fixed + rows * (rows - 1) / 2 * tile + rows * on_diagonal


if __name__ == "__main__":
    main()
