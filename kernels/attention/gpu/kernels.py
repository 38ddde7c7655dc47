"""Flash attention for Hopper (Mosaic GPU): what its three kernels share, and the forward one. The math is in `pallas_gpu`.

A block of threads has two warpgroups that compute, each for 64 rows of a tile, and one that copies the tiles which the visits
name into rings in shared memory. Logits are kept in units of log 2.
"""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels import gpu
from plait.kernels.attention.reference import MASKED as HIDDEN
from plait.kernels.attention.visits import MASKED, Layout, Visits, plan_visits, segment_starts
from plait.kernels.costs import cost
from plait.kernels.masks import block_number

Array = jax.Array

ROWS = 64
"""Rows of a product that one warpgroup computes."""

COMPUTE = 2
"""Warpgroups that compute."""

BLOCK = COMPUTE * ROWS
"""Queries (forward, dq) or keys (dk, dv) a block of threads; both sides are padded to multiples."""

COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24
"""Registers a thread of the warpgroups that compute and of the one that copies; 128 (2 * 240 + 24) of 65536."""

LOG2E = math.log2(math.e)
LN2 = math.log(2)

START = -1e30
"""The running maximum before the first tile."""

BELOW = 4 * START
"""A hidden logit: its weight is 0 beside any maximum, and finite so that 0 times it is 0."""


class Tiles(NamedTuple):
    """Tokens a tile on the side that a kernel visits, and tiles held ahead."""

    block_kv: int = 128
    """Keys a tile of the forward pass."""
    block_kv_dq: int = 64
    """Keys a tile of the query gradients."""
    block_q_dkv: int = 64
    """Queries a tile of the key and value gradients."""
    stages: int = 2


class Problem(NamedTuple):
    """What a kernel is specialised to."""

    layout: Layout
    """Of the padded sides."""
    num_keys: int
    """Without padding."""
    tiles: Tiles
    scale: float
    sigmoid: bool
    stats: bool
    soft_cap: float | None = None
    block_size: int | None = None
    """Keys a block of those that the queries select, if they do."""


class Operands(NamedTuple):
    """What every kernel reads; T and S are multiples of `BLOCK`."""

    q: Array
    """[B, T, H, K]"""
    k: Array
    """[B, S, Hkv, K]"""
    v: Array
    """[B, S, Hkv, V]"""
    bias: Array
    """[H] float32, added to the sigmoid's logits."""
    queries: Any
    """`Tokens`, int32 [B or 1, H or 1, T]"""
    keys: Any
    """`Tokens`, int32 [B or 1, 1, S]"""
    selected: Any = None
    """`SelectedBlocks`, or None."""


class Plan:
    """One kernel's launch: which tiles its blocks visit, and the arrays and scratch by name."""

    def __init__(self, problem: Problem, x: Operands, block_q: int, block_kv: int, *, over: str):
        self.problem, self.blocks, self.over = problem, {"q": block_q, "kv": block_kv}, over
        self.batch, self.length, self.num_heads, self.key_dim = x.q.shape
        self.num_keys, self.num_kv_heads, self.value_dim = x.v.shape[1:]
        self.group = self.num_heads // self.num_kv_heads
        pair = plan_visits(
            problem.layout,
            x.queries,
            x.keys,
            block_q,
            block_kv,
            keep_first=problem.stats,
            selected=x.selected,
            num_heads=self.num_heads,
        )
        pairs = problem.layout.expected(block_q, block_kv) * block_q * block_kv
        if x.selected is not None:
            chosen = x.selected.indices.shape[3] * x.selected.block_size
            pairs = min(pairs, self.length * chosen)
        self.pairs = self.batch * self.num_heads * pairs
        self.visits: Visits = pair[0] if over == "q" else pair[1]
        self.inputs: dict[str, Array] = {"q": x.q, "k": x.k, "v": x.v, "entries": self.visits.flat()}
        self.inputs["counts"] = self.visits.counts().reshape(-1)
        if problem.sigmoid:
            self.inputs["bias"] = x.bias * LOG2E
        if problem.layout.packed:
            self.inputs |= {"query_tokens": x.queries.stacked(), "key_tokens": x.keys.stacked()}
        if x.selected is not None:
            starts = segment_starts(problem.layout, x.queries, x.keys, x.selected)
            self.inputs["bits"] = x.selected.bits(starts, block_kv, self.num_keys // block_kv)[:, :, :, None]

    def run(
        self,
        body: Callable[[Any], None],
        name: str,
        *,
        columns: int,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Any],
        scratch: Mapping[str, Any],
    ) -> list[Array]:
        """Runs body(refs) over (heads, blocks, batch) with references by name; `inputs` join the plan's own. Of each pair of a query and a
        key the products have so many `columns`."""
        own_heads, blocks = (
            (self.num_heads, self.length // BLOCK) if self.over == "q" else (self.num_kv_heads, self.num_keys // BLOCK)
        )
        arrays = self.inputs | dict(inputs)
        names = (*arrays, *outputs, *scratch)
        kernel = gpu.call(
            lambda *refs: body(SimpleNamespace(**dict(zip(names, refs, strict=True)))),
            name=name,
            out_type=list(outputs.values()),
            scratch_types=list(scratch.values()),
            grid=(own_heads, blocks, self.batch),
            grid_names=("head", "block", "batch"),
            num_threads=COMPUTE + 1,
            thread_name="warpgroup",
            cost=cost((*arrays.values(), *outputs.values()), flops=2 * self.pairs * columns, transcendentals=self.pairs),
        )
        return kernel(*arrays.values())

    def where(self) -> tuple[Array, Array, Array, Array]:
        """(batch row, head, block, warpgroup) of this thread; the blocks with the most causal tiles come first."""
        b, h, i, wg = (jax.lax.axis_index(axis) for axis in ("batch", "head", "block", "warpgroup"))
        if self.over == "q" and self.problem.layout.mask.causal:
            i = self.length // BLOCK - 1 - i
        return b, h, i, wg

    def count(self, refs: Any, b: Array, head: Array, i: Array) -> Array:
        """Tiles that block i visits for a query head."""
        batch, heads, blocks, _ = self.visits.entries.shape
        return refs.counts[((b if batch > 1 else 0) * heads + (head if heads > 1 else 0)) * blocks + i]

    def entry(self, refs: Any, b: Array, head: Array, i: Array, step: Array) -> tuple[Array, Array]:
        """The first token of the tile visited at a step, and the tile's kind."""
        block, kind = self.visits.lookup(refs.entries, b, head, i, step)
        return block * self.blocks["kv" if self.over == "q" else "q"], kind

    def kv_head(self, head: Array) -> Array:
        """The key head of a query head."""
        return head if self.group == 1 else jax.lax.div(head, jnp.int32(self.group))


class Tile(NamedTuple):
    """A tile of logits: where it lies, and which axis holds the queries."""

    plan: Plan
    refs: Any
    b: Array
    head: Array
    """Of the queries."""
    first: tuple[Array, Array]
    """The first query and the first key."""
    shape: tuple[int, int]
    query_axis: int

    def hide(self, z: Array) -> Array:
        """Hidden logits become `BELOW`, in units of log 2 after scaling."""
        below = BELOW / (self.plan.problem.scale * LOG2E)
        return jnp.where(self._visible(), z, jnp.full_like(z, below))

    def is_first(self) -> Array:
        """Whether a key is its segment's first; also true of keys that are hidden."""
        return self._positions("key") == 0

    def _visible(self) -> Array:
        problem = self.plan.problem
        keys = self._positions("key")
        seen = problem.layout.mask.reaches(self._positions("query"), keys)
        if problem.layout.packed:
            ids = self._tokens("key", 0)
            seen &= (self._tokens("query", 0) == ids) & (ids != 0)
        elif problem.num_keys != self.plan.num_keys:
            seen &= keys < problem.num_keys
        if problem.block_size is not None:
            seen &= self._selected(keys, problem.block_size)
        return seen

    def _positions(self, side: str) -> Array:
        return self._tokens(side, 1) if self.plan.problem.layout.packed else self._indices(side) + self._start(side)

    def _tokens(self, side: str, which: int) -> Array:
        """Segments (0) or positions (1) of one side, spread over the tile."""
        array = self.refs.query_tokens if side == "query" else self.refs.key_tokens
        return self._spread(array, lambda b, h: (b, h, which), side)

    def _selected(self, positions: Array, block_size: int) -> Array:
        size = self.plan.blocks["kv"]
        tile = jax.lax.div(self.first[1], jnp.int32(size))
        bits = self._spread(self.refs.bits, lambda b, h: (b, h, tile, 0), "query")
        first = self._start("key") - tile * size  # of this warpgroup's part of the tile
        begin = jnp.maximum(positions - self._indices("key") - first, 0)
        entry = block_number(positions, block_size) - block_number(begin, block_size)
        return (jax.lax.shift_right_logical(bits, entry) & 1) == 1

    def _spread(self, array: Any, at: Callable[[Any, Any], tuple[Any, ...]], side: str) -> Array:
        """int32 of one side's tokens from an array [B or 1, Hs, ..., T or S]."""
        b, h = self.b if array.shape[0] > 1 else 0, self.head // (self.plan.num_heads // array.shape[1])
        axis = self._axis(side)
        source = array.at[(*at(b, h), pl.ds(self._start(side), self.shape[axis]))]
        return jax.lax.broadcast_in_dim(gpu.load(source, axis), self.shape, (axis,))

    def _indices(self, side: str) -> Array:
        return plgpu.broadcasted_iota(jnp.int32, self.shape, self._axis(side), layout=plgpu.Layout.WGMMA)

    def _axis(self, side: str) -> int:
        return self.query_axis if side == "query" else 1 - self.query_axis

    def _start(self, side: str) -> Array:
        return self.first[0 if side == "query" else 1]


def unhoisted(index: Array, start: Array) -> Array:
    """`index`, plus a 0 that the compiler cannot foresee, made from the start of the step's tile.

    A tile so indexed gets its `wgmma` descriptors anew in each step; else the loop keeps all of them in registers, and spills.
    """
    return index + (start >> 31)


def capped(problem: Problem, z: Array) -> Array:
    """Unscaled logits under the soft cap, unscaled again, or as they are."""
    if problem.soft_cap is None:
        return z
    unit = problem.soft_cap / problem.scale
    return unit * jnp.tanh(z * (1 / unit))


def where_masked(kind: Array, change: Callable[[Array], Array], x: Array) -> Array:
    """change(x) in tiles that need the mask, else x."""
    return jax.lax.cond(kind == MASKED, change, lambda x: x, x)


def log2_sigmoid(x: Array, bias: Array) -> Array:
    """log2 of the sigmoid whose logit is (x + bias) log 2, less the bias, beside a large one of which x would be lost."""
    return x - jnp.maximum(x + bias, 0) - jnp.log2(1 + jnp.exp2(-abs(x + bias)))


def forward(problem: Problem, x: Operands) -> tuple[Array, tuple[Array, ...]]:
    """o [B, T, H, V] in q's dtype, and rows [B, H, T] float32: lse, of the sigmoid with statistics less the bias, and, with
    statistics, maximum, entropy and first mass."""
    size, stages = problem.tiles.block_kv, problem.tiles.stages
    plan = Plan(problem, x, BLOCK, size, over="q")
    num_rows, dtype = 4 if problem.stats else 1, x.q.dtype
    shared = plan.key_dim == plan.value_dim  # then q's shared memory serves o too
    o, rows = plan.run(
        lambda refs: _forward_body(plan, refs),
        "attention_forward",
        columns=plan.key_dim + plan.value_dim,
        inputs={},
        outputs={
            "o": jax.ShapeDtypeStruct((*x.q.shape[:3], plan.value_dim), dtype),
            "rows": jax.ShapeDtypeStruct((plan.batch, plan.num_heads, num_rows, plan.length), jnp.float32),
        },
        scratch={
            "q_tile": gpu.tile((COMPUTE, ROWS, plan.key_dim), dtype),
            "o_tile": None if shared else gpu.tile((COMPUTE, ROWS, plan.value_dim), dtype),
            "row_tile": plgpu.SMEM((COMPUTE, num_rows, ROWS), jnp.float32),
            "weights": gpu.left_factor((COMPUTE, ROWS, size), dtype),
            "keys": gpu.ring(gpu.tile((stages, size, plan.key_dim), dtype), readers=COMPUTE),
            "values": gpu.ring(gpu.tile((stages, size, plan.value_dim), dtype), readers=COMPUTE),
            "arrived": plgpu.Barrier(num_barriers=COMPUTE),
            "turn": plgpu.Barrier(num_arrivals=COMPUTE),
        },
    )
    return o, tuple(rows[:, :, i] for i in range(num_rows))


def _forward_body(plan: Plan, refs: Any) -> None:
    b, h, i, wg = plan.where()
    count = plan.count(refs, b, h, i)

    @pl.when(wg == COMPUTE)
    def _load() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        copy_keys(plan, refs, b, h, i, count)

    @pl.when(wg < COMPUTE)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        _forward_rows(plan, refs, b, h, i, wg, count)


def copy_keys(plan: Plan, refs: Any, b: Array, h: Array, i: Array, count: Array) -> None:
    """Fills the rings of keys and values with the tiles that block i of head h visits."""

    def copy(step: Array, _: None) -> None:
        start, _kind = plan.entry(refs, b, h, i, step)
        at = (b, pl.ds(start, plan.blocks["kv"]), plan.kv_head(h))
        refs.keys.fill(step, refs.k.at[at])
        refs.values.fill(step, refs.v.at[at])

    jax.lax.fori_loop(0, count, copy, None)
    refs.keys.drain(count)
    refs.values.drain(count)


def _forward_rows(plan: Plan, refs: Any, b: Array, h: Array, i: Array, wg: Array, count: Array) -> None:
    """The online softmax over the visited tiles for the 64 queries of one warpgroup."""
    problem, size = plan.problem, plan.blocks["kv"]
    unit = problem.scale * LOG2E
    first = i * BLOCK + wg * ROWS
    crowded = plan.key_dim > 128 or (problem.sigmoid and problem.stats)
    q_tile = refs.q_tile.at[wg]
    at = (b, pl.ds(first, ROWS), h)
    plgpu.copy_gmem_to_smem(refs.q.at[at], q_tile, refs.arrived.at[wg])
    plgpu.barrier_wait(refs.arrived.at[wg])
    weights = None if refs.weights is None else refs.weights.at[wg]
    relative = problem.stats or not problem.sigmoid  # weights are kept relative to the largest

    def log_weight(z: Array) -> Array:  # log2 of the weight of a logit, less the sigmoid's bias
        return log2_sigmoid(z, refs.bias[h]) if problem.sigmoid else z

    def swap_turns() -> None:  # the two warpgroups take turns: one multiplies while the other takes exponentials
        plgpu.barrier_arrive(refs.turn)
        plgpu.barrier_wait(refs.turn)

    def step(n: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        acc, old, total, *extra = state
        start, kind = plan.entry(refs, b, h, i, n)
        tile = Tile(plan, refs, b, h, (first, start), (ROWS, size), 0)
        q_tile = refs.q_tile.at[unhoisted(wg, start) if crowded else wg]
        [key_tile] = refs.keys.read(n)
        [z] = gpu.products((q_tile, key_tile.transpose((1, 0))), issued=swap_turns)
        refs.keys.release(n)
        z = where_masked(kind, tile.hide, capped(problem, z))
        spread_out = lambda row: gpu.rows_to(row, size)
        exponents, peak = log_weight(z * unit), old
        if relative:
            peak = jnp.maximum(old, jnp.max(z, axis=1) * unit)
            exponents -= spread_out(log_weight(peak))
            rise = log_weight(peak) - log_weight(old)
            keep = jnp.exp2(-rise)
            acc, total = acc * gpu.rows_to(keep, plan.value_dim), total * keep
        else:
            exponents += refs.bias[h]
        p = jnp.exp2(exponents)
        if problem.stats:
            spread, first_mass = extra
            spread, first_mass = keep * spread - rise * total, keep * first_mass
            spread += jnp.sum(p * exponents, axis=1)
            first_mass = where_masked(
                kind, lambda mass: mass + jnp.sum(jnp.where(tile.is_first(), p, jnp.zeros_like(p)), axis=1), first_mass
            )
            extra = [spread, first_mass]
        total += jnp.sum(p, axis=1)
        p = p.astype(refs.v.dtype)
        acc, total, peak, p, *extra = jax.lax.optimization_barrier((acc, total, peak, p, *extra))
        plgpu.barrier_arrive(refs.turn)
        [value_tile] = refs.values.read(n)
        plgpu.barrier_wait(refs.turn)
        [acc] = gpu.accumulate((acc, p, value_tile), scratch=weights)
        refs.values.release(n)
        return acc, peak, total, *extra

    zero = gpu.full((ROWS,), 0.0)
    state = gpu.full((ROWS, plan.value_dim), 0.0), gpu.full((ROWS,), START), zero, *[zero] * (2 if problem.stats else 0)
    pl.when(wg == 1)(swap_turns)
    acc, peak, total, *extra = jax.lax.fori_loop(0, count, step, state)
    pl.when(wg == 0)(swap_turns)
    some = total > 0
    inverse = 1 / jnp.where(some, total, gpu.full((ROWS,), 1.0))
    log_mass = -jnp.log2(inverse)
    hidden = gpu.full((ROWS,), HIDDEN)
    rows = [jnp.where(some, LN2 * (log_mass + log_weight(peak) if relative else log_mass), hidden)]
    if problem.stats:
        spread, first_mass = extra
        rows += [jnp.where(some, LN2 * peak, hidden), jnp.where(some, LN2 * (log_mass - spread * inverse), zero)]
        rows.append(first_mass * inverse)
    o_tile = q_tile if refs.o_tile is None else refs.o_tile.at[wg]
    if relative:
        acc *= gpu.rows_to(jnp.exp2(log_weight(peak) + refs.bias[h]) if problem.sigmoid else inverse, plan.value_dim)
    o_tile[...] = acc.astype(refs.o.dtype)
    for r, row in enumerate(rows):
        refs.row_tile.at[wg, r][...] = row
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o_tile, refs.o.at[at])
    for r in range(len(rows)):
        plgpu.copy_smem_to_gmem(refs.row_tile.at[wg, r], refs.rows.at[b, h, r, pl.ds(first, ROWS)])
    plgpu.wait_smem_to_gmem(0)
