"""Attention for Hopper (Mosaic GPU) to tokens that queries choose one by one: rows of keys are gathered, so that work follows the choice.

A block of threads is one query: the heads of a group, up to 64, are the rows of its products, and the tokens chosen for them the columns.
A warpgroup gathers rows of keys (and of values, where those are not the first channels of the keys) into a ring of tiles, two others
compute: each has the logits of half of a tile's keys and the output's half of the channels, and they exchange maxima and weights.
Pallas' Triton backend, which gathers by itself, is deprecated and will be removed.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels import gpu
from plait.kernels.attention.gpu import rows as by_row
from plait.kernels.attention.gpu.kernels import BELOW, COMPUTE, LN2, LOG2E, ROWS, START
from plait.kernels.attention.reference import MASKED as HIDDEN
from plait.kernels.costs import cost

Array = jax.Array

HALF = 32
"""Keys of a tile that one warpgroup has the logits of."""

TILE = COMPUTE * HALF
"""Keys a tile of the forward pass; numbers of chosen tokens are padded to multiples."""

STAGES = 2

COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40
"""Registers a thread of the warpgroups that compute and of the one that gathers, which holds addresses; 128 (2 * 232 + 40) of 65536."""


class Problem(NamedTuple):
    """What a kernel is specialised to."""

    key_dim: int
    value_dim: int
    blocks: int
    """Blocks of heads in a group."""
    scale: float
    stats: bool

    def shared_memory(self, *, own_values: bool) -> int:
        """Bytes that the gradients need, of both kernels the most; `own_values` where they are not in the keys."""
        keys = self.key_dim + (self.value_dim if own_values else 0)
        tiles = ROWS * (self.key_dim + self.value_dim) + STAGES * HALF * keys + 2 * ROWS * HALF
        forward = ROWS * self.key_dim + STAGES * TILE * keys + ROWS * TILE
        return 2 * max(tiles + 2 * ROWS * HALF, forward) + (2 << 10)


class Operands(NamedTuple):
    """What both kernels read: P pairs of a query and a group, each of `blocks` blocks of R heads, at most 64."""

    q: Array
    """[P * blocks, R, K]; R is a multiple of 8, K and V are of 64."""
    k: Array
    """[B * S * G, K], the rows of all keys."""
    v: Array | None
    """[B * S * G, V]; None where they are the first channels of the keys."""
    rows: Array
    """int32 [P, N]: rows of k that are seen, -1 where there is none; N is a multiple of `TILE`."""


class Launch:
    """One kernel's launch, with the arrays and scratch by name."""

    def __init__(self, problem: Problem, x: Operands, size: int):
        self.problem, self.size, self.dtype = problem, size, x.q.dtype
        self.heads, self.key_dim, self.value_dim = x.q.shape[1], problem.key_dim, problem.value_dim
        self.own_values = x.v is not None
        last = jnp.max(jnp.where(x.rows >= 0, jnp.arange(1, x.rows.shape[1] + 1, dtype=jnp.int32), 0), axis=1)
        zeros = jnp.zeros((ROWS, max(x.q.shape[2], problem.value_dim)), self.dtype)
        self.inputs = {"q": x.q, "rows": x.rows, "counts": -(-last // size), "zeros": zeros}
        sources = {"k": x.k} | ({"v": x.v} if x.v is not None else {})
        if gpu.interpreted():  # gathered before the kernel
            sources = {name: jnp.where((x.rows >= 0)[..., None], source[x.rows], 0) for name, source in sources.items()}
        self.inputs |= sources
        self.pairs, self.num_chosen = x.rows.shape

    def ring(self) -> Any:
        """Scratch for the gathered tiles."""
        widths = (self.key_dim, self.value_dim) if self.own_values else (self.key_dim,)
        return gpu.ring(*(self.tile(STAGES, self.size, width) for width in widths), readers=COMPUTE)

    def tile(self, *shape: int) -> Any:
        """Scratch for a tile, swizzled as those that are gathered."""
        return gpu.tile(shape, self.dtype, depth=by_row.DEPTH)

    def run(
        self,
        body: Any,
        name: str,
        *,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Any],
        scratch: Mapping[str, Any],
        products: int,
    ) -> list[Array]:
        """Runs body(refs, number of the block) with references by name; `products` is the sum of the depths of all products of a pair."""
        arrays = self.inputs | dict(inputs)
        names = (*arrays, *outputs, *scratch)

        def with_names(*refs: Any) -> None:
            named = SimpleNamespace(**dict(zip(names, refs, strict=True)))
            wg = jax.lax.axis_index("warpgroup")
            block = jax.lax.axis_index("block")
            pair = block if self.problem.blocks == 1 else jax.lax.div(block, jnp.int32(self.problem.blocks))
            count = named.counts[pair]

            @pl.when(wg == COMPUTE)
            def _load() -> None:
                plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
                self._gather(named, pair, count)

            @pl.when(wg < COMPUTE)
            def _compute() -> None:
                plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
                body(named, block, pair, wg, count)

        blocks = self.pairs * self.problem.blocks
        chosen = blocks * self.heads * self.num_chosen
        width = self.key_dim + self.own_values * self.value_dim
        moving = {"k": self.dtype, "d_k": jnp.dtype(jnp.float32)}  # of each query its own
        moved = [x for name, x in (arrays | dict(outputs)).items() if name not in (*moving, "v", "d_v")]
        moved += [jax.ShapeDtypeStruct((blocks, self.num_chosen, width), dtype) for x, dtype in moving.items() if x in arrays]
        kernel = gpu.call(
            with_names,
            name=name,
            sums_columns=False,
            out_type=list(outputs.values()),
            scratch_types=list(scratch.values()),
            grid=(blocks,),
            grid_names=("block",),
            num_threads=COMPUTE + 1,
            thread_name="warpgroup",
            cost=cost(moved, flops=2 * chosen * products, transcendentals=chosen),
        )
        return kernel(*arrays.values())

    def _gather(self, refs: Any, pair: Array, count: Array) -> None:
        """Fills the ring with the tiles of a pair's keys, and values."""
        sources = [refs.k, refs.v] if self.own_values else [refs.k]
        ring, size = refs.ring, self.size
        if gpu.interpreted():

            def copy(n: Array, _: None) -> None:
                ring.fill(n, *(source.at[pair, pl.ds(n * size, size)] for source in sources))

            jax.lax.fori_loop(0, count, copy, None)
            ring.drain(count)
            return

        def hand_over(n: Array, still: int) -> None:
            by_row.wait(still)
            plgpu.commit_smem()
            for _ in sources:
                plgpu.barrier_arrive(ring.filled.at[ring.slot(n)])

        def start(n: Array, _: None) -> None:
            slot = ring.slot(n)
            pl.when(n >= STAGES)(lambda: plgpu.barrier_wait(ring.free.at[slot]))
            for tile, source in zip(ring.tiles, sources, strict=True):
                by_row.gather(tile.at[slot], source, refs.rows.at[pair, pl.ds(n * size, size)])
            pl.when(n > 0)(lambda: hand_over(n - 1, len(sources)))

        jax.lax.fori_loop(0, count, start, None)
        pl.when(count > 0)(lambda: hand_over(count - 1, 0))
        ring.drain(count)

    def fetch(self, refs: Any, *copies: tuple[Any, Any]) -> None:
        """Copies heads [R, N] into the tiles [64, N] of (tile, heads), zeros below; to be called by one warpgroup, and awaited by both."""
        for tile, heads in copies:
            width = heads.shape[1]
            plgpu.copy_gmem_to_smem(heads, tile.at[pl.ds(0, self.heads)], refs.arrived)
            if self.heads < ROWS:
                rest = ROWS - self.heads
                plgpu.copy_gmem_to_smem(
                    refs.zeros.at[pl.ds(0, rest), pl.ds(0, width)], tile.at[pl.ds(self.heads, rest)], refs.arrived
                )

    def put(self, refs: Any, wg: Array, x: Array, target: Any, first: Array) -> None:
        """Writes x [64, N], a product of this warpgroup, to the columns of `target` [R, M] from `first` on, through its part of `weights`."""
        staged = refs.weights.at[wg]
        for column in range(0, x.shape[1], HALF):
            staged[...] = x[:, column : column + HALF].astype(self.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, self.heads)], target.at[:, pl.ds(first + column, HALF)])
            plgpu.wait_smem_to_gmem(0)

    def arrivals(self, tiles: int) -> int:
        """Copies that `fetch` makes for a number of tiles."""
        return tiles * (2 if self.heads < ROWS else 1)


def meet(refs: Any) -> None:
    """Shows what this warpgroup has stored to the other, and waits for what that has."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.turn)
    plgpu.barrier_wait(refs.turn)


def forward(problem: Problem, x: Operands) -> tuple[Array, Array]:
    """o [P * blocks, R, V] in q's dtype, and rows float32 [P * blocks, 1 or 3, 64]: lse and, with statistics, maximum and entropy."""
    launch = Launch(problem, x, TILE)
    num_rows = 3 if problem.stats else 1
    o, rows = launch.run(
        lambda refs, *where: _forward_rows(launch, refs, *where),
        "chosen_tokens_forward",
        inputs={},
        outputs={
            "o": jax.ShapeDtypeStruct((*x.q.shape[:2], problem.value_dim), launch.dtype),
            "found": jax.ShapeDtypeStruct((x.q.shape[0], num_rows, ROWS), jnp.float32),
        },
        scratch={
            "q_tile": launch.tile(ROWS, problem.key_dim),
            "weights": launch.tile(COMPUTE, ROWS, HALF),
            "shared": plgpu.SMEM((COMPUTE, 2, ROWS), jnp.float32),
            "row_tile": plgpu.SMEM((num_rows, ROWS), jnp.float32),
            "ring": launch.ring(),
            "arrived": plgpu.Barrier(num_arrivals=launch.arrivals(1)),
            "turn": plgpu.Barrier(num_arrivals=COMPUTE),
        },
        products=problem.key_dim + problem.value_dim,
    )
    return o, rows


def _forward_rows(launch: Launch, refs: Any, block: Array, pair: Array, wg: Array, count: Array) -> None:
    """The online softmax over the tiles, in units of log 2: each warpgroup sums over its half of the keys, and the output's channels."""
    problem = launch.problem
    width = problem.value_dim // COMPUTE
    other, own_columns = 1 - wg, pl.ds(wg * HALF, HALF)
    channels = pl.ds(wg * width, width)
    pl.when(wg == 0)(lambda: launch.fetch(refs, (refs.q_tile, refs.q.at[block])))
    plgpu.barrier_wait(refs.arrived)

    def step(n: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        acc, old, total, *extra = state
        rows = numbers(refs, pair, n * TILE + wg * HALF)
        key_tile, *rest = refs.ring.read(n)
        value_tile = rest[0] if rest else key_tile
        [z] = gpu.products((refs.q_tile, key_tile.at[own_columns].transpose((1, 0))))
        z = hidden(rows, z * (problem.scale * LOG2E))
        refs.shared.at[wg, 0][...] = jnp.max(z, axis=1)
        meet(refs)
        peak = jnp.maximum(old, jnp.maximum(gpu.load(refs.shared.at[0, 0], 0), gpu.load(refs.shared.at[1, 0], 0)))
        rise = peak - old
        keep = jnp.exp2(-rise)
        exponents = z - gpu.rows_to(peak, HALF)
        p = jnp.exp2(exponents)
        if problem.stats:
            extra = [keep * extra[0] - rise * (keep * total) + jnp.sum(p * exponents, axis=1)]
        total = keep * total + jnp.sum(p, axis=1)
        refs.weights.at[wg][...] = p.astype(launch.dtype)
        meet(refs)
        acc *= gpu.rows_to(keep, width)
        for half in range(COMPUTE):
            values = value_tile.at[pl.ds(half * HALF, HALF), channels]
            [acc] = gpu.accumulate((acc, refs.weights.at[half], values))
        refs.ring.release(n)
        return acc, peak, total, *extra

    zero = gpu.full((ROWS,), 0.0)
    state = gpu.full((ROWS, width), 0.0), gpu.full((ROWS,), START), zero, *[zero] * problem.stats
    acc, peak, *sums = jax.lax.fori_loop(0, count, step, state)
    meet(refs)
    for i, part in enumerate(sums):
        refs.shared.at[wg, i][...] = part
    meet(refs)
    total, *extra = (part + gpu.load(refs.shared.at[other, i], 0) for i, part in enumerate(sums))
    some = total > 0
    inverse = 1 / jnp.where(some, total, gpu.full((ROWS,), 1.0))
    log_mass, unseen = -jnp.log2(inverse), gpu.full((ROWS,), HIDDEN)
    found = [jnp.where(some, LN2 * (log_mass + peak), unseen)]
    if problem.stats:
        found += [jnp.where(some, LN2 * peak, unseen), jnp.where(some, LN2 * (log_mass - extra[0] * inverse), zero)]
    launch.put(refs, wg, acc * gpu.rows_to(inverse, width), refs.o.at[block], wg * width)

    @pl.when(wg == 0)
    def _rows() -> None:
        for r, row in enumerate(found):
            refs.row_tile.at[r][...] = row
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.row_tile, refs.found.at[block])
        plgpu.wait_smem_to_gmem(0)


def numbers(refs: Any, pair: Array, start: Array) -> Array:
    """Rows int32 [32] of the chosen tokens of a pair from `start` on, in the layout of what each column of a product has one of."""
    return gpu.load(refs.rows.at[pair, pl.ds(start, HALF)], 1)


def hidden(rows: Array, z: Array) -> Array:
    """Logits [64, 32], `BELOW` where there is no row."""
    return jnp.where(gpu.columns_to(rows, ROWS) >= 0, z, jnp.full_like(z, BELOW))
