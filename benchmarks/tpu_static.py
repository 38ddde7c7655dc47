"""The static estimates of `kernels.py --target`: one program a process, each printing the cycles that libtpu's compiler gives."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SHAPES = {"attention": "1x4096x1x128", "short_conv": "1x2048x8x128", "cross_entropy": "1x2048x8x128"}
"""By op; the recurrences have one head of one sequence, 2048 tokens."""

ATTENTION = ("full", "full-stats", "masked", "masked-stats", "splash")
KERNELS = {"forward": 2, "all_gradients": 5}
"""The attention kernels and their products of tiles."""


def estimates(args: Any) -> tuple[list[dict[str, Any]], str]:
    """Rows of the table, and its title."""
    from plait.train.verify.rooflines import PEAKS, Shape, least
    from plait.train.verify.trials import TIMED

    peak, rows = PEAKS[args.target], []
    dtype = args.dtype or "bfloat16"
    for op in (args.ops or ",".join(TIMED)).split(","):
        for size in (args.shapes or SHAPES.get(op, "1x2048x1x128")).split(","):
            shape = Shape(*map(int, size.split("x")), args.vocabulary or 8192)
            default = ",".join((*ATTENTION, "chunked")) if op == "attention" else "pallas_tpu,chunked"
            for backward in (False, True):
                flops, moved = least(op, shape, 2 if dtype == "bfloat16" else 4, backward=backward)
                if op == "attention":
                    flops *= 2  # every tile is visited
                bound = peak.clock * peak.seconds(flops, moved)
                for name in (args.implementations or default).split(","):
                    job = {"target": args.target, "op": op, "shape": shape, "dtype": dtype, "backward": backward, "name": name}
                    found = _estimate(job | {"block": args.block, "tile": args.block and [args.block] * 4}, args.timeout)
                    ours, others = found["kernels"], found["others"]
                    total = None if ours is None else sum(ours.values()) + others
                    small = total is not None and ours and total < peak.clock * flops / peak.flops
                    rows.append(
                        {
                            "op": op,
                            "shape": str(shape),
                            "pass": "forward + backward" if backward else "forward",
                            "implementation": name,
                            "kernels": "no estimate" if ours is None else " + ".join(f"{n:,}" for n in ours.values()) or "-",
                            "XLA": f"{others:,}",
                            "roofline": f"{bound:,.0f}",
                            "% of roofline": ""
                            if total in (None, 0)
                            else "not believed"
                            if small
                            else f"{100 * bound / total:.0f}",
                            "VMEM MiB": f"{found['vmem'] / 2**20:.1f}" if found["vmem"] else "",
                        }
                    )
    return rows, f"{args.target}, {dtype}: cycles by the compiler's static estimate, not measured"


def _estimate(job: dict[str, Any], timeout: int) -> dict[str, Any]:
    """`kernels` (cycles by name, or None without an estimate), `others` (cycles) and `vmem` (bytes, the most of any kernel)."""
    if job["op"] == "attention" and job["name"] not in ("chunked", "splash", "splash-fused"):
        parts = [_run(job | {"kernel": kernel}, timeout) for kernel in (KERNELS if job["backward"] else ("forward",))]
        known = all(part["kernels"] is not None for part in parts)
        merged = {name: cycles for part in parts for name, cycles in (part["kernels"] or {}).items()}
        return {"kernels": merged if known else None, "others": 0, "vmem": max(part["vmem"] for part in parts)}
    profiled = job["name"] not in ("chunked", "reference")
    found = _run(job | {"profile": profiled}, timeout)
    if found["kernels"] is None and profiled:  # the compiler's estimates of the rest do not need the profile
        found = _run(job | {"profile": False}, timeout) | {"kernels": None}
    return (
        found | {"others": 0} if job["name"].startswith("splash") else found
    )  # kernels beside kernels: ours are estimated alone too


def _run(job: dict[str, Any], timeout: int) -> dict[str, Any]:
    command = [sys.executable, __file__, json.dumps({"profile": True} | job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        print(f"# {job['op']} {job['name']}: no estimate within {timeout} s", file=sys.stderr)
        return {"kernels": None, "others": 0, "vmem": 0}
    if found := re.search(r"^estimate (.*)$", done.stdout, re.M):
        return json.loads(found[1])
    errors = [line for line in done.stderr.splitlines() if "Error: " in line and "worker hostname" not in line]
    reason = errors[-1][:200] if errors and done.returncode > 0 else f"exit {done.returncode}"
    print(f"# {job['op']} {job['name']}: no estimate: {reason}", file=sys.stderr)
    return {"kernels": None, "others": 0, "vmem": 0}


def work(job: dict[str, Any]) -> None:
    """Compiles one program and prints its estimate."""
    dump = Path(tempfile.mkdtemp())
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    if job["profile"]:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={dump}"
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from plait.kernels.target import target

    where = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[job["target"]]).devices[0])
    array = lambda *s, dtype=job["dtype"]: jax.ShapeDtypeStruct(s, dtype, sharding=where)
    ours = _selected_kernel if "cut" in job else _attention_kernel if "kernel" in job else _public
    build = _splash if job["name"].startswith("splash") else _choosing if job["op"] == "choosing" else ours
    if job["op"] == "chosen_tokens":
        from chosen_tokens_static import kernel as build
    if job["op"] == "choosing_tokens":
        from chosen_tokens_static import choosing as build
    if job["op"] == "plain_indexer":
        from chosen_tokens_static import plain as build
    with target(job["target"]):
        function, operands = build(job, array)
        lowered = jax.jit(function).lower(*operands)
        text = lowered.compile().as_text()
    lines = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    names = {re.match(r"\s*(?:ROOT )?%?(\S+) =", line)[1] for line in lines}
    vmem = [int(m[1]) for line in lines if (m := re.search(r'memory_configs":\[\{"memory_space":"1".*?"size":"(\d+)"', line))]
    kernels = {}
    for file in dump.glob("*.textproto"):
        found = re.search(r'hlo_op_name: "(.*)"\s+estimated_cycles: (\d+)', file.read_text())
        if found and found[1] in names:
            kernels[found[1]] = int(found[2])
    known = kernels if len(kernels) == len(names) else None
    found = {"kernels": known, "flops": _said(lowered.as_text()), "others": _fusions(text), "vmem": max(vmem, default=0)}
    print("estimate", json.dumps(found))


def _said(stablehlo: str) -> dict[str, int]:
    """Operations by kernel, as it says itself."""
    calls = [line for line in stablehlo.splitlines() if "@tpu_custom_call(" in line]
    said = (
        (re.search(r'kernel_name = "(\w+)"', line), re.search(r"cost_estimate\b.*?\\22flops\\22:(\d+)", line)) for line in calls
    )
    return {name[1]: int(flops[1]) for name, flops in said if name and flops}


def _fusions(hlo: str) -> int:
    """The compiler's estimates of the fusions of a module, loops times their trips."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name, entry = found[2], found[2] if found[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def cycles(name: str) -> int:
        total = 0
        for line in bodies.get(name, ()):
            own = re.search(r'"estimated_cycles":"(\d+)"', line)
            if own and "custom-call(" not in line and "tpu_custom_call" not in line:
                total += int(own[1])
            if loop := re.search(r"while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                trips = trips or re.search(r"constant\((\d+)\)", "\n".join(bodies.get(loop[1], ())))
                total += cycles(loop[2]) * (int(trips[1]) if trips else 1)
        return total

    return cycles(entry)


def _public(job: dict[str, Any], array: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The op's public function, with the gradients of all its arrays if they are wanted."""
    import jax
    import jax.numpy as jnp

    from plait.train.verify.rooflines import Shape
    from plait.train.verify.speed import implementations
    from plait.train.verify.trials import TIMED, differentiable

    trial = TIMED[job["op"]]
    shapes = trial.shapes(Shape(*job["shape"]), job["dtype"])
    operands = ({name: array(*x.shape, dtype=x.dtype.name) for name, x in shapes.items()},)
    call = implementations(trial)[job["name"]]

    def both(x: Any) -> Any:
        learned = differentiable(x)
        out, pullback = jax.vjp(lambda learned: call({**x, **learned}), learned)
        return out, pullback(jnp.cos(out))

    return both if job["backward"] else call, operands


def _attention_kernel(job: dict[str, Any], array: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One attention kernel with a list of tiles known at compile time: every tile of the square in order, all of one kind.

    The kind is `job["name"]`: full, masked, edge (with `job["cells"]` for what order shows) or skip (nothing is computed), with or without
    statistics.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from plait.kernels import Mask, Tokens
    from plait.kernels.attention import pallas_tpu
    from plait.kernels.attention.tpu import carried, edges, kernels, steps, tiling
    from plait.kernels.attention.visits import FULL, MASKED, SKIP, Layout

    _, length, _, width, *_ = job["shape"]
    tiles = pallas_tpu.choose_tiles(job["target"], width, width, jnp.dtype(job["dtype"]))
    if job["tile"]:
        tiles = replace(tiles, **dict.fromkeys(("forward", "gradients"), tiling.Tile(*job["tile"])))
    tiles = tiles.fit(length, length)
    layout = Layout(mask=Mask(), num_queries=length, num_keys=length, own_keys=True, packed=True)
    name, _, stats = job["name"].partition("-")
    kind = {"full": FULL, "masked": MASKED, "edge": edges.FIRST_EDGE, "skip": SKIP}[name]

    class Every:
        """Stands for `Steps`."""

        def __init__(self, kinds: Any, _: int):
            self.longest, self.num_minor = kinds.shape[2] * kinds.shape[4], kinds.shape[4]

        def read(self, table: Any, b: Any, h: Any, step: Any) -> steps.Step:
            at = jax.lax.rem(step, self.num_minor)
            ends = ((at == n).astype(jnp.int32) for n in (0, self.num_minor - 1))
            return steps.Step(jax.lax.div(step, self.num_minor), 0, at, kind, *ends)

    tiling.plan_steps = Every
    carried.Carried.enter = carried.Carried.leave = lambda _: None  # copies by hand have no estimate
    carried.Carried.here = property(lambda sums: sums.blocks.at[0])
    carried.pltpu = type(
        "Memory", (), {"SMEM": tiling.pltpu.VMEM, "VMEM": tiling.pltpu.VMEM, "SemaphoreType": tiling.pltpu.SemaphoreType}
    )
    sight = lambda state: edges.Band(*state) if isinstance(state, list) else state
    cells = tuple(tuple(map(sight, row)) for row in job.get("cells", ()))
    tile = tiles.forward if job["kernel"] == "forward" else tiles.gradients
    block_q, block_kv = tile.block_q // edges.CELL, tile.block_kv // edges.CELL
    shown = sum(bool(state) for row in cells[:block_kv] for state in row) if kind == edges.FIRST_EDGE else block_q * block_kv
    num_cells = shown * (length // tile.block_q) * (length // tile.block_kv)
    tiling.banded_edges = lambda *_: edges.Edges(np.array(MASKED), (cells,), (kind,) if kind else (), 0, num_cells)
    tiling.tile_kinds = lambda layout, q, kv, block_q, block_kv, **_: jnp.zeros(
        (1, 1, length // block_q, length // block_kv), int
    )
    problem = tiling.Problem(layout, tiles, width**-0.5, False, stats == "stats")
    x, v = (array(1, 1, length, n) for n in (width, job.get("value_dim", width)))
    token = array(1, 1, length, dtype=jnp.int32)
    rows = [array(1, 1, length, dtype=jnp.float32)] * (5 if stats else 2)
    side = Tokens(None, token, token)
    operands = tiling.Operands(x, x, v, array(1, dtype=jnp.float32), side, side)

    def function(table: Any, *operands: Any) -> Any:
        Every.entries = table
        return getattr(kernels, job["kernel"])(problem, *operands)

    return function, (array(1, dtype=jnp.int32), operands, *(() if job["kernel"] == "forward" else (v, rows)))


def _selected_kernel(job: dict[str, Any], array: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One kernel of attention to selected blocks, forward or all_gradients: `job["batch"]` rows of `job["steps"]` tiles of queries,
    each with `job["visits"]` visits.

    `job["cut"]` is a `Cut`, and the name is one of `visit_kinds`. With `job["open"]` nothing hides any key: under a mask the products of v5e's
    and v5p's key gradients have no estimate.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from plait.kernels import Mask, SelectedBlocks, Tokens
    from plait.kernels.attention.tpu import edges, lists, rectangles, selected, tiling, walk
    from plait.kernels.attention.tpu.cut import Cut
    from plait.kernels.attention.visits import Layout, Visits

    visits, width = job["visits"], job["shape"][3]
    cut = Cut(*job["cut"])
    batch, num_queries, num_keys = (
        job.get("batch", 1),
        cut.queries * job.get("steps", 1),
        cut.keys * cut.visited * job.get("longest", visits),
    )
    # Lists in scalar memory, copies by hand and gathers have no estimate: tiles are visited in order, and the copies are left out.
    nothing = type("Copy", (), dict.fromkeys(("start", "wait"), lambda _: None))()
    walk.pltpu.SMEM, walk.pltpu.make_async_copy = walk.pltpu.VMEM, lambda *_: nothing
    walk.tile_kinds = lambda *_, **__: jnp.zeros((batch, 1, num_queries // cut.queries, num_keys // cut.keys), int)
    lists.ordered = lambda kinds, *_, **__: Visits(kinds)
    lists._listed = lambda _, n: 4 * n + 1
    kinds = visit_kinds(cut)[job["name"].partition("-")[0]]
    rectangles.Rectangles.kinds = lambda *_: [kinds]
    if edges.FIRST_EDGE in kinds:
        cells = tuple(
            tuple(0 if query < key else 1 + (query > key) for query in range(cut.queries // edges.CELL))
            for key in range(cut.keys // edges.CELL)
        )
        rectangles._edge = lambda *_: edges.Edges(np.zeros(()), (cells,), (edges.FIRST_EDGE,), 0, 0)
    if job.get("open"):
        every = rectangles.Rectangles.of
        rectangles.Rectangles.of = lambda *args: [part._replace(visible=None, chosen=None) for part in every(*args)]
    walk._each = lambda _, visit: jax.lax.fori_loop(0, visits, visit, None)
    layout = Layout(mask=Mask(), num_queries=num_queries, num_keys=num_keys, own_keys=False, packed=True)
    problem = tiling.Problem(layout, cut, width**-0.5, False, job["name"].endswith("stats"))
    q, k = array(batch, cut.heads, num_queries, width), array(batch, 1, num_keys, width)
    sides = (Tokens(None, *[array(batch, 1, n, dtype=jnp.int32)] * 2) for n in (num_queries, num_keys))
    blocks = SelectedBlocks(
        indices=array(batch, num_queries, 1, 4, dtype=jnp.int32),
        block_size=cut.block_size,
        num_blocks=num_keys // cut.block_size + 1,
    )
    operands = tiling.Operands(q, k, k, array(cut.heads, dtype=jnp.float32), *sides, blocks)
    rows = [array(batch, cut.heads, num_queries, dtype=jnp.float32)] * (5 if problem.stats else 2)
    kernel = partial(getattr(selected, job["kernel"]), problem)
    return kernel, (operands, *(() if job["kernel"] == "forward" else (q, rows)))


def visit_kinds(cut: Any) -> dict[str, tuple[int, ...]]:
    """The kinds of the tiles that a visit of selected blocks brings together, by name: "selected" are under the mask, and of "chosen" ones the
    choice alone hides keys, as of "one" by itself; "own" has such behind those that queries have of their own, "diagonal" behind the one on
    the diagonal, and "edge" is that by itself. A visit of one tile has the last name that fits."""
    from plait.kernels.attention.tpu.edges import FIRST_EDGE
    from plait.kernels.attention.visits import FULL, MASKED, SKIP

    own, rest = max(1, cut.queries // cut.keys), cut.visited - 1
    return {
        "selected": (MASKED,) * cut.visited,
        "own": (*[MASKED] * own, *[FULL] * (cut.visited - own)),
        "diagonal": (FIRST_EDGE, *[FULL] * rest),
        "edge": (FIRST_EDGE, *[SKIP] * rest),
        "chosen": (FULL,) * cut.visited,
        "one": (FULL, *[SKIP] * rest),
    }


def _choosing(job: dict[str, Any], array: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The blocks that 32,768 queries of 16 heads choose, together as NSA or, with `job["each"]`, each by itself as MoBA."""
    import jax.numpy as jnp

    from plait.kernels import Tokens, topk_blocks

    length, heads, each = 32768, 16, job.get("each", False)
    count = length // (512 if each else 16)
    options: dict[str, Any] = {"block_size": 512, "top_k": 3}
    if not each:
        options = {
            "block_size": 64,
            "top_k": 16,
            "num_local": 2,
            "num_first": 1,
            "stride": 16,
            "span": 32,
            "scale": 0.1,
            "by_group": True,
        }

    def choose(q: Any, blocks: Any, ids: Any, numbers: Any) -> Any:
        at, blocks_at = Tokens(None, jnp.ones((1, length), jnp.int32)), Tokens(None, ids, numbers)
        more = options | {"num_blocks": length // options["block_size"], "implementation": job["name"]}
        return topk_blocks(q, blocks, blocks_at=blocks_at, at=at, **more).indices

    place = array(1, count, dtype=jnp.int32)
    return choose, (array(1, length, heads, 128), array(1, count, heads if each else 1, 128), place, place)


def _splash(job: dict[str, Any], array: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """JAX's splash attention without a mask, which is a table of scalars to it; its gradients by one kernel under the name "splash-fused"."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    _, length, _, width, *_ = job["shape"]
    fused = job["name"] == "splash-fused"
    of = ("", "_dkv") if fused else ("", "_dq", "_dkv")
    names = [f"block_{a}{b}" for a in ("q", "kv") for b in of] + ["block_kv_compute", "block_kv_dkv_compute"]
    sizes = kernels.BlockSizes(**dict.fromkeys(names, job["block"] or 512), use_fused_bwd_kernel=fused)
    everything = MaskInfo(None, None, None, None, None)
    mask = masks.MultiHeadMask([masks.FullMask((length, length))])
    attend = kernels.make_splash_mha_single_device(mask, block_sizes=sizes)
    attend = kernels.SplashAttentionKernel(everything, everything, everything, **attend.kwargs)
    operands = (array(1, length, width),) * 3
    if not job["backward"]:
        return attend, operands
    return jax.grad(lambda *a: attend(*a).astype(jnp.float32).sum(), (0, 1, 2)), operands


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
