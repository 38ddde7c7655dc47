"""Bytes that the linear recurrences move through a GPU's memory, counted from programs compiled ahead of time; no GPU, no measurement.

    python benchmarks/gpu_bytes.py [--ops scalar_decay,kda] [--dims 128x128,256x512] [--seq-len 4096] [--heads 4] [--list]

Needs the extra `aot` on a JAX that has the kernels. Every kernel launch and every pass of XLA (fusion, copy, product) of the optimised
program counts its operands and its results once each, loops times their trips. That is what must pass through memory if no cache holds
anything from one launch to the next; what one launch reads twice (a chunk's keys, for each block of the values) is taken to come out of
the cache the second time. Bytes are divided by tokens and value heads; so is the device memory that the program holds at most beside its
arguments and results. `--list` prints every launch and pass.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from typing import Any, NamedTuple

OPS = ("scalar_decay", "vector_decay", "deltanet", "gated_deltanet", "kda")
SIZES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
FREE = {
    "parameter",
    "constant",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "while",
    "conditional",
    "call",
    "after-all",
    "iota",
    "partition-id",
}
"""Operations that move nothing themselves."""


class Traffic(NamedTuple):
    """One launch, or one pass of XLA."""

    name: str
    kernel: bool
    """Whether it is a kernel of ours."""
    num_bytes: int


def array_bytes(text: str) -> int:
    """The bytes of all arrays in an HLO type."""
    return sum(
        SIZES[dtype] * math.prod(map(int, filter(None, dims.split(","))))
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", text)
    )


def traffic(hlo: str, *, slices: bool = False) -> list[Traffic]:
    """What the optimised program launches, in its order; what a loop holds, once a trip.

    With `slices` an operand of which a pass reads slices alone, or numbers by a list, counts what is read of it, and a result that is one
    operand but for a slice counts the slice; of a condition the branch counts that is taken where it holds.
    """
    bodies: dict[str, list[tuple[str, str, str, str]]] = {}
    types: dict[str, str] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = found[2]
            entry = name if found[1] else entry
            bodies[name] = []
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line):
            types[found[1]] = found[2]
            if name:
                bodies[name].append((found[1], found[3], re.split(r"\)(?:,|$)", found[4])[0], line))

    def moved(result: str, operation: str, operands: list[str], inner: str | None) -> int:
        """Bytes of a pass, which does its work in the computation `inner`, if in any."""
        body = bodies.get(inner or "", ())
        parameters = {int(x[2]): x[0] for x in body if x[1] == "parameter"}
        whole, out = array_bytes(types[result]), 0
        if slices and operation.endswith("-start"):  # its tuple names the operands again
            whole -= sum(array_bytes(types[x]) for x in operands)
        updates = [x for x in body if x[1] == "dynamic-update-slice"] if slices else []
        begun: set[str] = set()
        for name, _, text, _ in updates:
            into, update = re.findall(r"%([\w.\-]+)", text)[:2]
            if array_bytes(types[name]) == whole:
                out, begun = array_bytes(types[update]), begun | {into}
        total = out or whole
        for i, operand in enumerate(operands):
            size, parameter = array_bytes(types[operand]), parameters.get(i)
            uses = [x for x in body if parameter and re.search(rf"%{re.escape(parameter)}\b(?![.\-])", x[2])]
            if not slices or not uses:
                total += size if operand not in operands[:i] else 0
            elif parameter in begun and len(uses) == 1:
                continue
            elif all(x[1] in ("dynamic-slice", "slice", "gather") for x in uses):
                total += min(size, sum(array_bytes(types[x[0]]) for x in uses))
            else:
                total += size
        return total

    def walk(name: str) -> list[Traffic]:
        found: list[Traffic] = []
        for result, operation, operands, line in bodies.get(name, ()):
            if operation == "while" and (loop := re.search(r"body=%?([\w.\-]+)", line)):
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                found += walk(loop[1]) * (int(trips[1]) if trips else 1)
            elif operation == "call" and (callee := re.search(r"to_apply=%?([\w.\-]+)", line)):
                found += walk(callee[1])
            elif slices and operation == "conditional" and (branch := re.search(r"true_computation=%?([\w.\-]+)", line)):
                found += walk(branch[1])
            if operation in FREE or (slices and operation.endswith("-done")):
                continue
            fused = re.search(r"calls=%?([\w.\-]+)", line)
            if fused and any("mosaic_gpu" in x[3] for x in bodies.get(fused[1], ())):  # A launch that reads or writes slices.
                found += [x for x in walk(fused[1]) if x.kernel]
                continue
            read = re.findall(r"%([\w.\-]+)", operands)
            num_bytes = moved(result, operation, read, fused[1] if fused else None)
            kernel = "mosaic_gpu" in line
            label = re.search(r'op_name="[^"]*?(\w+)/mpmd_map"', line) if kernel else None
            found.append(Traffic(label[1] if label else result, kernel, num_bytes))
        return found

    return walk(entry)


def programs(
    op: str, key_dim: int, value_dim: int, *, length: int, heads: int, group: int = 1, generation: str = "h100"
) -> dict[str, Any]:
    """The compiled programs of a forward pass without gradients, and of a forward and a backward pass."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from plait import kernels
    from plait.kernels.target import target
    from plait.train.pods.plan.gpu_descriptions import GPU_DESCRIPTIONS

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=generation, topology="1x1x1", target_config=GPU_DESCRIPTIONS[generation]
    )
    where = SingleDeviceSharding(topology.devices[0])
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    qk, v = array(1, length, heads // group, key_dim), array(1, length, heads, value_dim)
    by_channel = op in ("vector_decay", "kda")
    g = None if op == "deltanet" else array(1, length, heads, *[key_dim] * by_channel, dtype=jnp.float32)
    delta = not op.endswith("_decay")
    function = kernels.delta_rule if delta else kernels.decay
    args: tuple[Any, ...] = (qk, qk, v, g, *([array(1, length, heads)] if delta else []))

    def forward(*args: Any) -> Any:
        return function(*args, implementation="pallas_gpu")[0]

    def both(d_o: Any, *args: Any) -> Any:
        o, pullback = jax.vjp(forward, *args)
        return o, pullback(d_o)

    with target(generation):
        compile_ = lambda function, *args: jax.jit(function).lower(*args).compile()
        return {"forward": compile_(forward, *args), "both": compile_(both, v, *args)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--dims", default="64x64,128x128,256x512", help="K x V of a head")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4, help="value heads, by which bytes are divided")
    parser.add_argument("--group", type=int, default=1, help="value heads of a key head")
    parser.add_argument("--generation", default="h100")
    parser.add_argument("--list", action="store_true", help="every launch and pass")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    print(
        f"{args.generation}, B=1, T={args.seq_len}, {args.heads} heads, {args.group} a key head: kB a token and head, as compiled"
    )
    print("| op | K x V | pass | launches | kB | XLA passes | kB | kB in all | kB held |\n|---|---|---|---|---|---|---|---|---|")
    share = args.seq_len * args.heads * 1000
    for dims in args.dims.split(","):
        key_dim, value_dim = map(int, dims.split("x"))
        for op in args.ops.split(","):
            compiled = programs(
                op, key_dim, value_dim, length=args.seq_len, heads=args.heads, group=args.group, generation=args.generation
            )
            for name, program in compiled.items():
                found = traffic(program.as_text())
                held = program.memory_analysis().temp_size_in_bytes / share
                parts = [[x.num_bytes for x in found if x.kernel == kernel] for kernel in (True, False)]
                cells = [f"{len(part)} | {sum(part) / share:.1f}" for part in parts]
                print(
                    f"| `{op}` | {dims} | {name} | {' | '.join(cells)} | {sum(map(sum, parts)) / share:.1f} | {held:.1f} |",
                    flush=True,
                )
                for x in found if args.list else ():
                    print(f"    {x.num_bytes / share:8.3f} {'kernel' if x.kernel else 'XLA':6} {x.name}")


if __name__ == "__main__":
    main()
