"""Cycles of the TPU attention kernels as libtpu's compiler estimates them: statically, without a TPU, no measurement.

    python benchmarks/attention_tpu_static.py [--generation v5e] [--seq-len 4096] [--head-dim 128] [--block 512]

Needs libtpu (`pip install 'jax[tpu]'`). The compiler walks its final schedule of each kernel. It takes values loaded from memory
as 0, so a table of tiles would count as "nothing to do": here every tile of one head's square is visited in order, all either as
wholly visible or all under the mask (causal is about half the first and, on the diagonal, the second). Memory traffic is not
contended; a number below FLOPs / peak is not believed. JAX's splash attention is estimated without a mask, for that reason.
Each kernel is compiled in a process of its own, since the estimator aborts on what it does not model.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PEAK = {"v5e": 197e12 / 1.5e9, "v5p": 459e12 / 1.75e9 / 2, "v6e": 918e12 / 1.75e9}
"""bfloat16 FLOPs a cycle of one core."""

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
PRODUCTS = {"forward": 2, "query_gradients": 3, "key_gradients": 4}
"""Tile products of each kernel."""


def compile_one(args: argparse.Namespace) -> None:
    """Compiles one kernel with the estimator on; prints the cycles of each TPU kernel in it."""
    dump = Path(tempfile.mkdtemp())
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={dump}"
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[args.generation]).devices[0]
    where = SingleDeviceSharding(device)
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype, sharding=where)  # noqa: E731
    length, width = args.seq_len, args.head_dim
    x = shape(1, 1, length, width)
    function, operands = (_splash if args.variant == "splash" else _plait)(args, x, shape)
    jax.jit(function).lower(*operands).compile()
    for file in dump.glob("*.textproto"):
        found = re.search(r'hlo_op_name: "(.*)"\s+estimated_cycles: (\d+)', file.read_text())
        if found and re.search(r"attention|splash", found[1]):
            print("cycles", found[1], found[2])


def _plait(args: argparse.Namespace, x, shape):
    import jax.numpy as jnp
    import numpy as np

    from plait.kernels import Mask
    from plait.kernels.attention import pallas_tpu, tpu_kernels
    from plait.kernels.attention.reference import Tokens
    from plait.kernels.attention.schedule import FULL, MASKED, Layout

    length, width = args.seq_len, args.head_dim
    names = ("block_q", "block_kv", "block_q_dq", "block_kv_dq", "block_q_dkv", "block_kv_dkv")
    tiles = pallas_tpu.choose_tiles(args.generation, width, width, jnp.bfloat16)
    if args.block:
        tiles = tpu_kernels.Tiles(**dict.fromkeys(names, args.block))
    tiles = tiles.fit(length, length)
    layout = Layout(mask=Mask(), num_queries=length, num_keys=length, own_keys=True, packed=True)
    kind = MASKED if args.variant.startswith("masked") else FULL
    stats = args.variant.endswith("stats")
    blocks = (length // tiles.block_kv, length // tiles.block_q_dkv)

    class Every:
        """A schedule known at compile time: every tile in order, all of one kind."""

        def __init__(self, width: int):
            self.entries = np.zeros((1, 1, width))

        def lookup(self, table, b, i, step):
            return step, kind

    tpu_kernels.schedules = lambda *_, **__: tuple(map(Every, blocks))
    problem = tpu_kernels.Problem(layout, tiles, width**-0.5, False, stats)
    token = shape(1, length, dtype=jnp.int32)
    rows = shape(1, 1, 6 if stats else 2, length, dtype=jnp.float32)
    side = Tokens(token, token)
    operands = tpu_kernels.Operands(x, x, x, shape(1, dtype=jnp.float32), side, side)

    def function(table, *operands):
        Every.flat = lambda self: table
        return getattr(tpu_kernels, args.kernel)(problem, *operands)

    return function, (shape(1, dtype=jnp.int32), operands, *(() if args.kernel == "forward" else (x, rows)))


def _splash(args: argparse.Namespace, x, shape):
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    names = [f"block_{a}{b}" for a in ("q", "kv") for b in ("", "_dq", "_dkv")] + ["block_kv_compute", "block_kv_dkv_compute"]
    sizes = kernels.BlockSizes(**dict.fromkeys(names, args.block or 512))
    everything = MaskInfo(None, None, None, None, None)
    mask = masks.MultiHeadMask([masks.FullMask((args.seq_len, args.seq_len))])
    attend = kernels.make_splash_mha_single_device(mask, block_sizes=sizes)
    attend = kernels.SplashAttentionKernel(everything, everything, everything, **attend.kwargs)
    operands = [shape(*x.shape[1:])] * 3
    if args.kernel == "forward":
        return attend, operands
    return jax.grad(lambda *a: attend(*a).astype(jnp.float32).sum(), (0, 1, 2)), operands


def estimate(kernel: str, variant: str, argv: list[str]) -> dict[str, int]:
    """Cycles by kernel name; empty where the estimator gives none."""
    command = [sys.executable, __file__, *argv, "--kernel", kernel, "--variant", variant]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = {m[1]: int(m[2]) for m in re.finditer(r"^cycles (\S+) (\d+)$", done.stdout, re.M)}
    if not found:
        print(f"# no estimate of {kernel} {variant}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", choices=PEAK, default="v5e")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block", type=int, help="tokens a tile on both sides; the default is the heuristic's choice")
    parser.add_argument("--variants", default="full,full-stats,masked,masked-stats,splash")
    parser.add_argument("--kernels", default=",".join(PRODUCTS))
    parser.add_argument("--kernel", help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        compile_one(args)
        return
    print(f"{args.generation}, one head, T=S={args.seq_len}, K=V={args.head_dim}, bfloat16: estimated, not measured")
    for kernel in args.kernels.split(","):
        least = PRODUCTS[kernel] * 2 * args.seq_len**2 * args.head_dim / PEAK[args.generation]
        for variant in args.variants.split(","):
            if variant == "splash" and kernel == "query_gradients":
                continue  # one process estimates both of its gradient kernels
            for name, cycles in estimate(kernel, variant, sys.argv[1:]).items():
                share = f"{least / cycles:.0%} of peak" if variant != "splash" or kernel == "forward" else ""
                wrong = "  BELOW FLOPs / peak: not believed" if cycles < least and share else ""
                print(f"{kernel:16} {variant:13} {cycles:>10,} {share}{wrong}  {name}", flush=True)


if __name__ == "__main__":
    main()
