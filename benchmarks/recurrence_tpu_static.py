"""Cycles of the linear recurrences' TPU kernels as libtpu's compiler estimates them: statically, without a TPU, no measurement.

    python benchmarks/recurrence_tpu_static.py [--generation v5e] [--seq-len 2048] [--head-dim 128] [--ops kda,scalar_decay]

Needs libtpu (`pip install 'jax[tpu]'`). The compiler walks its final schedule of each kernel, here for one head of one sequence. Memory
traffic is not contended, so the roofline's bytes stand beside the cycles: the larger of the two counts. The chunked form in XLA is
given as the sum of the compiler's estimates of its fusions, a loop's body times its trips. Each program is compiled in a process of
its own, since the estimator aborts on what it does not model.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
OPS = ("scalar_decay", "vector_decay", "deltanet", "gated_deltanet", "kda")


def roofline(op: str, kernel: str, width: int, generation: str) -> tuple[float, float]:
    """Least cycles a token by FLOPs and by bytes, in chunks of 128: triangles as halves, no recomputation, nothing stored twice."""
    from plait.train.verify.rooflines import PEAKS

    delta, by_channel = op not in ("scalar_decay", "vector_decay"), op in ("vector_decay", "kda")
    products = 2 * width * width + 64 * width * 2  # read and write the state; scores and their product with v
    if delta:
        products += width * width + 64 * width * 2 + 128 * 128 / 6  # read at the keys; key scores, inverse times values, inverse
    bytes_ = 2 * 4 * width + (4 * width if by_channel else 4) + (4 if delta else 0)
    if op == "deltanet":
        bytes_ -= 4
    backward = kernel == "backward"
    peak = PEAKS[generation]
    cycles = peak.clock * peak.cores  # a second, of all cores
    return (3 if backward else 1) * 2 * products / peak.flops * cycles, (2 if backward else 1) * bytes_ / peak.bandwidth * cycles


def compile_one(args: argparse.Namespace) -> None:
    """Compiles one program; prints its cycles."""
    dump = Path(tempfile.mkdtemp())
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    if args.implementation == "pallas_tpu":
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={dump}"
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[args.generation]).devices[0]
    where = SingleDeviceSharding(device)
    shape = lambda *s, dtype="float32": jax.ShapeDtypeStruct(s, dtype, sharding=where)
    function, operands = (_kernel if args.implementation == "pallas_tpu" else _chunked)(args, shape)
    from plait.kernels.target import target

    with target(args.generation):
        compiled = jax.jit(function).lower(*operands).compile()
    text = compiled.as_text()
    if args.implementation == "chunked":
        print("cycles", round(total_cycles(text) / args.heads), 0)
    for file in dump.glob("*.textproto"):
        found = re.search(r'hlo_op_name: "(.*)"\s+estimated_cycles: (\d+)', file.read_text())
        if found and re.search(r"decay_and_add|erase_and_write", found[1]):
            call = next(line for line in text.splitlines() if "tpu_custom_call" in line)
            vmem = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1".*?"size":"(\d+)"', call)
            print("cycles", found[2], vmem[1] if vmem else 0)


def total_cycles(hlo: str) -> int:
    """The estimated cycles of an HLO module, loops times their trips."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = found[2]
            entry = name if found[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def cycles(name: str) -> int:
        total = 0
        for line in bodies.get(name, ()):
            if own := re.search(r'"estimated_cycles":"(\d+)"', line):
                total += int(own[1])
            if loop := re.search(r"while\(.*body=%?([\w.\-]+)", line):
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                total += cycles(loop[1]) * (int(trips[1]) if trips else 1)
        return total

    return cycles(entry)


def _inputs(args: argparse.Namespace, shape, heads: int = 1):
    one = (1, args.seq_len, heads)
    wide = (*one, args.head_dim)
    x = shape(*wide, dtype=args.dtype)
    gate = {"deltanet": None, "vector_decay": shape(*wide), "kda": shape(*wide)}.get(args.op, shape(*one))
    gates = (gate,) if args.op in ("scalar_decay", "vector_decay") else (gate, shape(*one))
    return x, gates


def _kernel(args: argparse.Namespace, shape):
    from plait.kernels.recurrence import tpu_chunk, tpu_driver, tpu_kernels

    x, gates = _inputs(args, shape)
    chunk = tpu_chunk.decay_and_add if len(gates) == 1 else tpu_chunk.erase_and_write
    full = args.dtype == "float32"
    by_channel = gates[0] is not None and len(gates[0].shape) == 4
    tiles = tpu_driver.choose_tiles(args.generation, args.head_dim, args.head_dim, full, by_channel)
    if args.tiles:
        tiles = tpu_kernels.Tiles(**dict(zip(tiles.__dict__, map(int, args.tiles.split(",")), strict=True)))
    tiles = tiles.fit(args.seq_len)
    problem = tpu_kernels.Problem(chunk, tiles, args.head_dim**-0.5, full, args.stats)
    state = shape(1, 1, args.head_dim, args.head_dim)
    tokens = shape(1, 3, args.seq_len) if args.segments else None
    operands = tpu_kernels.Operands(x, x, x, gates, state, tokens)
    if args.kernel == "forward":
        return lambda x: tpu_kernels.forward(problem, x, keep=True), (operands,)
    entering = shape(1, 1, args.seq_len // (tiles.chunk_size * tiles.backward_chunks), *state.shape[2:])
    return lambda *arrays: tpu_kernels.backward(problem, *arrays), (operands, entering, x, state)


def _chunked(args: argparse.Namespace, shape):
    import jax
    import jax.numpy as jnp

    from plait import kernels

    x, gates = _inputs(args, shape, args.heads)
    op = kernels.decay if len(gates) == 1 else kernels.delta_rule
    ids = shape(1, args.seq_len, dtype="int32") if args.segments else None

    def run(q, k, v, gates, ids):
        return op(q, k, v, *gates, at=kernels.Tokens(None, ids), implementation="chunked")

    def both(q, k, v, gates, ids, d_o):
        _, pullback = jax.vjp(lambda *x: run(*x, ids)[0].astype(jnp.float32), q, k, v, gates)
        return pullback(d_o)

    if args.kernel == "forward":
        return run, (x, x, x, gates, ids)
    return both, (x, x, x, gates, ids, shape(*x.shape))


def estimate(argv: list[str], **chosen: str) -> tuple[int, int] | None:
    """Cycles and VMEM bytes of one program; None where the estimator gives none."""
    command = [sys.executable, __file__, *argv, *(part for name, value in chosen.items() for part in (f"--{name}", value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"^cycles (\d+) (\d+)$", done.stdout, re.M)
    if found is None:
        print(f"# no estimate of {chosen}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return int(found[1]), int(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", choices=TOPOLOGY, default="v5e")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--heads", type=int, default=8, help="heads of the chunked form, whose cycles are divided by them")
    parser.add_argument("--segments", action="store_true")
    parser.add_argument("--stats", action="store_true")
    parser.add_argument("--tiles", help="chunk_size,forward_chunks,backward_chunks; the default is the heuristic's choice")
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--kernels", default="forward,backward")
    parser.add_argument("--implementations", default="pallas_tpu,chunked")
    for name in ("op", "kernel", "implementation"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.op:
        compile_one(args)
        return
    print(
        f"{args.generation}, one head, T={args.seq_len}, K=V={args.head_dim}, {args.dtype}: estimated cycles a token, not measured"
    )
    print("the chunked form's backward includes its forward; least: the larger of FLOPs / peak and bytes / bandwidth")
    for op in args.ops.split(","):
        for kernel in args.kernels.split(","):
            flops, memory = roofline(op, kernel, args.head_dim, args.generation)
            line = f"{op:15} {kernel:9} least {max(flops, memory):5.2f} (FLOPs {flops:.2f}, bytes {memory:.2f})"
            for implementation in args.implementations.split(","):
                if found := estimate(sys.argv[1:], op=op, kernel=kernel, implementation=implementation):
                    vmem = f" ({found[1] / 2**20:.1f} MiB VMEM)" if found[1] else ""
                    line += f"  {implementation} {found[0] / args.seq_len:.2f}{vmem}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
