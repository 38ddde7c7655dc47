"""What share of a TPU's peak each kernel reaches by the compiler's static cycles: makes
`train/pods/plan/compiled/kernel_shares.py`, which plans use.

    python benchmarks/kernel_shares.py FILE [--targets v5e,v6e]

Needs the extra `aot`. Estimates are appended to FILE, a line of JSON each, and the same command goes on where it was ended; what the module
holds is printed. A kernel's operations are those that it says to XLA (`plait.kernels.costs`), so that operations over peak and share are its
cycles. Attention has tiles that are all visible; recurrences have four heads, as many as one step takes. bfloat16.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import tpu_static

WIDTHS = {
    "attention": (64, 128, 256),
    "scalar_decay": (64, 128),
    "vector_decay": (64, 128),
    "gated_deltanet": (64, 128, 256),
    "kda": (64, 128),
    "short_conv": (128,),
    "cross_entropy": (128,),
}
CUT, VISITS = (64, 16, 128, 64), 65
"""Of selected blocks: those of NSA with 16 heads."""


def jobs(target: str) -> list[dict[str, Any]]:
    """What is estimated of a target."""
    found = []
    for op, widths in WIDTHS.items():
        for width in widths:
            job = {"target": target, "op": op, "dtype": "bfloat16", "backward": True, "block": None, "tile": None}
            if op == "attention":
                shape = (1, 4096, 1, width)
                found += [job | {"shape": shape, "kernel": kernel, "name": "full"} for kernel in tpu_static.KERNELS]
            else:
                heads = 8 if op in ("short_conv", "cross_entropy") else 4
                found.append(job | {"shape": (1, 2048, heads, width, 8192), "name": "pallas_tpu"})
    blind = target in ("v5e", "v5p")  # of masked gradients there is no estimate
    for kernel, width in itertools.product(tpu_static.KERNELS, (64, 128)):
        job = {"target": target, "op": "attention", "shape": (1, 2048, 1, width), "dtype": "bfloat16", "backward": True}
        job |= {"kernel": kernel, "name": "selected", "open": blind and kernel == "all_gradients"}
        found.append(job | {"cut": CUT, "visits": VISITS})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where estimates are kept, a line each")
    parser.add_argument("--targets", default=",".join(tpu_static.TOPOLOGY), help="generations")
    parser.add_argument("--timeout", type=int, default=900, help="seconds an estimate")
    args = parser.parse_args()
    args.file.touch()
    known = dict(map(json.loads, args.file.read_text().splitlines()))
    from plait.kernels.chips import CHIPS

    print("SHARES: dict[str, dict[str, dict[int, float]]] = {")
    for target in args.targets.split(","):
        chip, shares = CHIPS[target], defaultdict[str, dict[int, float]](dict)
        a_cycle = chip.flops / chip.cores / chip.clock
        for job in jobs(target):
            key = json.dumps(job, sort_keys=True)
            if key not in known:
                known[key] = tpu_static._run(job, args.timeout)
                with args.file.open("a") as file:
                    print(json.dumps([key, known[key]]), file=file)
            found = known[key]
            for name, cycles in (found["kernels"] or {}).items():
                kernel = max((kernel for kernel in found["flops"] if kernel in name), key=len)
                more = VISITS * 128 / (4 * CUT[0]) if "cut" in job else 1  # 4 blocks are said to be chosen
                flops = found["flops"][kernel] * more
                width = 0 if job["op"] in ("short_conv", "cross_entropy") else job["shape"][3]
                shares[kernel][width] = flops / cycles / a_cycle
        print(f'    "{target}": {{')
        for kernel, by_width in sorted(shares.items()):
            print(f'        "{kernel}": {{{", ".join(f"{width}: {share:.4f}" for width, share in sorted(by_width.items()))}}},')
        print("    },", flush=True)
    print("}")


if __name__ == "__main__":
    main()
