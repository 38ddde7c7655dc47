"""Cycles of the linear recurrences' TPU kernels as libtpu's compiler estimates them: statically, without a TPU, no measurement.

    python benchmarks/recurrence_tpu_static.py [--generation v5e] [--seq-len 2048] [--head-dim 128] [--ops kda,scalar_decay]

Needs libtpu (`pip install 'jax[tpu]'`). The compiler walks its final schedule of each kernel, here for one sequence of several
heads, by which cycles are divided. Memory traffic is not contended, so the roofline's bytes stand beside the cycles: the larger of the
two counts. The chunked form in XLA is given as the sum of the compiler's estimates of its fusions, a loop's body times its trips.
Each program is compiled in a process of its own, since the estimator aborts on what it does not model. It gives 0 for a kernel with a
copy out of VMEM that it does not model (heads with a stride between them): no estimate, too.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
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
            print("cycles", round(int(found[2]) / args.heads), vmem[1] if vmem else 0)


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


def _inputs(args: argparse.Namespace, shape):
    one = (1, args.seq_len, args.heads)
    wide = (*one, args.head_dim)
    x = shape(*wide, dtype=args.dtype)
    k = shape(1, args.seq_len, args.heads // args.group, args.head_dim, dtype=args.dtype)
    gate = {"deltanet": None, "vector_decay": shape(*wide), "kda": shape(*wide)}.get(args.op, shape(*one))
    gates = (gate,) if args.op in ("scalar_decay", "vector_decay") else (gate, shape(*one))
    return k, x, gates


def _kernel(args: argparse.Namespace, shape):
    """The kernel alone: its operands and results are laid out as it reads and writes them, so that no copy stands beside it."""
    import jax

    from plait.kernels.recurrence import tpu_chunk, tpu_driver, tpu_grid, tpu_kernels

    k, x, gates = _inputs(args, shape)
    chunk = tpu_chunk.decay_and_add if len(gates) == 1 else tpu_chunk.erase_and_write
    full = args.dtype == "float32"
    by_channel = gates[0] is not None and len(gates[0].shape) == 4
    widths, heads = (args.head_dim, args.head_dim), (args.heads // args.group, args.heads)
    tiles = tpu_driver.choose_tiles(args.generation, *widths, full, by_channel, len(gates) > 1, 1, heads)
    if args.tiles:
        tiles = tpu_grid.Tiles(**dict(zip(tiles.__dict__, map(int, args.tiles.split(",")), strict=True)))
    tiles = tiles.fit(args.seq_len)
    problem = tpu_grid.Problem(chunk, tiles, args.head_dim**-0.5, full, args.stats)
    state = shape(1, args.heads, args.head_dim, args.head_dim)
    tokens = shape(1, 3, args.seq_len) if args.segments else None
    backward = args.kernel == "backward"
    like = tpu_grid.Operands(k, k, x, gates, state, tokens)
    grid = tpu_grid.Grid(problem, like, reverse=backward)
    laid = jax.tree.map(lambda y: shape(*y.shape, dtype=y.dtype), jax.eval_shape(lambda y: grid.inputs(y)[0], like))
    o = shape(*jax.eval_shape(tpu_grid.lay, x).shape, dtype=x.dtype)
    if not backward:

        def forward(laid, state):
            o, *rest = tpu_kernels.forward(problem, grid.operands(laid, state), keep=True)
            return tpu_grid.lay(o), rest

        return forward, (laid, state)

    def pullback(laid, state, entering, d_o):
        d = tpu_kernels.backward(problem, grid.operands(laid, state), entering, tpu_grid.token_major(d_o, x.shape), state)
        return grid.inputs(d)[0], d.state

    each = tiles.forward_chunks // tiles.backward_chunks
    entering = shape(1, args.seq_len // (tiles.chunk_size * tiles.forward_chunks), args.heads, each, *state.shape[2:])
    return pullback, (laid, state, entering, o)


def _chunked(args: argparse.Namespace, shape):
    import jax
    import jax.numpy as jnp

    from plait import kernels

    k, x, gates = _inputs(args, shape)
    op = kernels.decay if len(gates) == 1 else kernels.delta_rule
    ids = shape(1, args.seq_len, dtype="int32") if args.segments else None

    def run(q, k, v, gates, ids):
        return op(q, k, v, *gates, at=kernels.Tokens(None, ids), implementation="chunked")

    def both(q, k, v, gates, ids, d_o):
        _, pullback = jax.vjp(lambda *x: run(*x, ids)[0].astype(jnp.float32), q, k, v, gates)
        return pullback(d_o)

    if args.kernel == "forward":
        return run, (k, k, x, gates, ids)
    return both, (k, k, x, gates, ids, shape(*x.shape))


def estimate(argv: list[str], **chosen: str) -> tuple[int, int] | None:
    """Cycles and VMEM bytes of one program; None where the estimator gives none."""
    command = [sys.executable, __file__, *argv, *(part for name, value in chosen.items() for part in (f"--{name}", value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"^cycles (\d+) (\d+)$", done.stdout, re.M)
    if found is None or found[1] == "0":
        print(f"# no estimate of {chosen}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return int(found[1]), int(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", choices=TOPOLOGY, default="v5e")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--heads", type=int, default=8, help="value heads, by which cycles are divided")
    parser.add_argument("--group", type=int, default=1, help="value heads of a key head")
    parser.add_argument("--segments", action="store_true")
    parser.add_argument("--stats", action="store_true")
    parser.add_argument(
        "--tiles",
        help="chunk_size,forward_chunks,backward_chunks,forward_heads,backward_heads; the default is the heuristic's choice",
    )
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
        f"{args.generation}, {args.heads} heads, {args.group} a key head, T={args.seq_len}, K=V={args.head_dim}, {args.dtype}: "
        "estimated cycles a token and head, not measured"
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
