"""Times the ops of `plait.kernels` by implementation and shape, with peers beside them and a roofline; or estimates them for TPUs.

    python benchmarks/kernels.py [--ops kda,attention] [--shapes 1x2048x4x64] [--dtype float32] [--json out.json]
    python benchmarks/kernels.py --target v5e [--ops cross_entropy,short_conv,attention]

Timed on the machine at hand: each cell is the median of several calls and their interquartile range. The implementations of an op
take turns, call by call, so that a busy machine hits all alike; `x` is the first implementation's time over this one's. The roofline
is the larger of FLOPs / peak and bytes / bandwidth of what the op must do (`least` of `plait.train.verify.rooflines`), by the chip's
data sheet, and on a CPU by this machine's own best matrix product and sum.

With --target nothing runs: the program is compiled for that TPU and the cycles are the compiler's own static estimates. **These are
no measurements.** Their limits: values loaded from memory count as 0, so attention is estimated with a fixed table of tiles, all
visible or all masked (causal is about half the square); memory traffic does not contend, so the roofline's time is given beside and
the larger counts; ops outside our kernels (XLA) count with the compiler's coarser estimate of each fusion, a loop's body times its
trips. Each program is compiled in a process of its own, since the estimator aborts on what it does not model: "no estimate". A
kernel below its FLOPs / peak is marked as not believed. Needs libtpu (`pip install 'jax[tpu]'`).
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

TARGETS = ("v5e", "v5p", "v6e")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, help="estimate for this TPU instead of timing")
    parser.add_argument("--ops", help="comma-separated; all by default")
    parser.add_argument("--implementations", help="comma-separated; those that support the call by default")
    parser.add_argument("--shapes", help="comma-separated BxTxHxD; the default depends on the machine")
    parser.add_argument("--vocabulary", type=int, help="words of cross_entropy; 32,768, and 8,192 on a CPU or for a target")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="float32 on a CPU, else bfloat16")
    parser.add_argument("--repeats", type=int, default=7, help="calls of each")
    parser.add_argument("--block", type=int, help="with --target: tokens a tile of attention on both sides")
    parser.add_argument("--timeout", type=int, default=300, help="with --target: seconds a compile may take")
    parser.add_argument("--json", help="also write the rows there")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.target:
        import tpu_static

        rows, title = tpu_static.estimates(args)
    else:
        rows, title = timings(args)
    show(rows, title)
    if args.json:
        Path(args.json).write_text(json.dumps({"title": title, "rows": rows}, indent=1))


def show(rows: list[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in rows[0] if rows else ():
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) and name != "time" else "right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:,.3g}" for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def timings(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Rows of the table, one for each op, pass, shape and implementation."""
    import jax
    from torch_peers import torch_peers

    from plait.kernels.target import current
    from plait.train.verify.devices import peak_here
    from plait.train.verify.peers import peers
    from plait.train.verify.rooflines import Shape, least
    from plait.train.verify.speed import implementations, prepared
    from plait.train.verify.timing import timed
    from plait.train.verify.trials import TIMED

    cpu, here = jax.default_backend() == "cpu", current()
    dtype = args.dtype or ("float32" if cpu else "bfloat16")
    sizes = args.shapes or ("1x2048x4x64" if cpu else "4x4096x16x128,1x16384x16x64")
    vocabulary = args.vocabulary or (8192 if cpu else 32_768)
    peak = peak_here(dtype)
    rows = []
    for op in (args.ops or ",".join(TIMED)).split(","):
        for size in sizes.split(","):
            shape = Shape(*map(int, size.split("x")), vocabulary)
            print(f"# {op}, {shape}", file=sys.stderr)
            x = TIMED[op].draw(shape, dtype)
            functions = implementations(TIMED[op])
            if args.implementations:
                functions = {name: functions[name] for name in args.implementations.split(",")}
            functions |= peers(op)
            for backward in (False, True):
                calls = {name: prepared(f, x, backward) for name, f in functions.items()}
                calls |= {name: partial(f, backward) for name, f in torch_peers(op, x).items()}
                bound = peak.seconds(*least(op, shape, jax.numpy.dtype(dtype).itemsize, backward=backward))
                first = None
                for name, taken in timed(calls, args.repeats).items():
                    if isinstance(taken, NotImplementedError):
                        if "backend is" not in str(taken):
                            print(f"# {name}: {taken}", file=sys.stderr)
                        continue
                    if isinstance(taken, Exception):
                        raise taken
                    first = first or taken.middle
                    rows.append(
                        {
                            "op": op,
                            "shape": str(shape),
                            "pass": "forward + backward" if backward else "forward",
                            "implementation": name,
                            "ms": 1e3 * taken.middle,
                            "IQR ms": f"{1e3 * taken.low:.3g} - {1e3 * taken.high:.3g}",
                            "x": first / taken.middle,
                            "% of roofline": 100 * bound / taken.middle,
                        }
                    )
    where = here.generation if here is not None else f"{jax.devices()[0].device_kind}, {peak.flops / 1e9:.0f} GFLOP/s measured"
    return rows, f"{where}, JAX {jax.__version__}, {dtype}"


if __name__ == "__main__":
    main()
