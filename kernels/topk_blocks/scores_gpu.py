"""The scores of block selection for Hopper (Mosaic GPU) where the heads of a group choose together: their sums are made in registers.

A block of threads has two warpgroups that compute, 64 queries each, and one that copies. Of a tile of queries and a chunk of what is scored
the products of one head after the other enter the sum, which alone is written; the chunk stays in shared memory, the queries of the heads
go through a ring. A softmax has a kernel before it, which finds the log-normaliser of every row and head. Numbers of float32 are three of
bfloat16, whose products but the least add up to theirs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels import gpu
from plait.kernels.costs import cost
from plait.kernels.shapes import padded
from plait.kernels.topk_blocks.call import TopkCall
from plait.kernels.topk_blocks.tiles import query_rows, reached, scored_rows

Array = jax.Array

ROWS = 64
"""Queries of a product that one warpgroup computes."""

COMPUTE = 2
"""Warpgroups that compute."""

QUERIES = COMPUTE * ROWS
"""Queries a tile."""

COLUMNS = 128
"""What is scored in one product, at most."""

STAGED = 64
"""Columns of the sums that are written together."""

CHANNELS = 64
"""Channels are padded to multiples."""

COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40

LOG2E = math.log2(math.e)

HIDDEN = -1e30
"""A logit whose weight is 0."""

NEVER = -(1 << 31)
"""The word of what a query has no score for, below those of all scores."""


class Tiles(NamedTuple):
    """What is scored in a chunk, and tiles in the ring."""

    chunk: int
    stages: int


SIZES = Tiles(256, 3), Tiles(256, 2), Tiles(128, 3), Tiles(128, 2), Tiles(128, 1), Tiles(64, 1)
"""The first that fits is taken."""


class Problem(NamedTuple):
    """What the kernels are specialised to."""

    tiles: Tiles
    scale: float | None
    weighed: bool
    piece: int | None
    """Of scores that become whole numbers in the same order, how many are wanted together: others are left as they are."""
    group: int
    width: int
    parts: tuple[int, int]
    """Arrays of bfloat16 that q and what is scored are the sums of."""

    @property
    def unit(self) -> float:
        """The scale of logits, in units of log 2."""
        return LOG2E * (1.0 if self.scale is None else self.scale)


def tiles_of(call: TopkCall) -> Tiles | None:
    """The tiles for a call, or None where none fit."""
    width = call.q.shape[3] + -call.q.shape[3] % CHANNELS
    of_queries, of_chunk = _num_parts(call.q), _num_parts(call.blocks)
    for tiles in SIZES:
        if tiles.chunk > COLUMNS and of_queries * of_chunk > 1:
            continue
        numbers = width * (of_chunk * tiles.chunk + of_queries * tiles.stages * QUERIES)
        if 2 * numbers + 4 * QUERIES * STAGED + (2 << 10) <= gpu.MAX_SMEM:
            return tiles
    return None


class Operands(NamedTuple):
    """What the kernels read; T and N are whole tiles and chunks."""

    q: tuple[Array, ...]
    """Each [B, T, H, K]."""
    c: tuple[Array, ...]
    """Each [B, N, Hkv, K]."""
    rows: Array
    """int32 [B, 2, T], as `tiles.query_rows`."""
    tokens: Array
    """int32 [B, 2, N], as `tiles.scored_rows`."""
    bounds: Array
    """int32 [B, tiles, 2]: the first chunk that has something to score for a tile, or might, and the one after the last."""
    whole: Array
    """int32 [B, tiles, chunks], 1 where all queries of a tile have scores for all of a chunk."""
    weights: Array | None
    """float32 [B, H, T]."""


def operands(call: TopkCall, piece: int | None = None) -> tuple[Problem, Operands]:
    """Of a call that tiles fit; for words with a number of these, a multiple of a chunk, that are wanted together."""
    tiles = tiles_of(call)
    assert tiles is not None
    size = piece or tiles.chunk
    rows, tokens = padded(query_rows(call), 2, QUERIES), padded(scored_rows(call), 2, size)
    whole = lambda x, size: padded(padded(x, 1, size), 3, CHANNELS)
    q, c = _in_parts(whole(call.q, QUERIES)), _in_parts(whole(call.blocks, size))
    weights = None
    if call.weights is not None:
        weights = padded(jnp.swapaxes(call.weights.astype(jnp.float32), 1, 2), 2, QUERIES)
    problem = Problem(
        tiles=tiles,
        scale=call.scale,
        weighed=weights is not None,
        piece=piece,
        group=q[0].shape[2] // c[0].shape[2],
        width=q[0].shape[3],
        parts=(len(q), len(c)),
    )
    return problem, Operands(q, c, rows, tokens, *reached(rows, tokens, QUERIES, tiles.chunk), weights)


def scores(call: TopkCall) -> Array:
    """As `reference.scores`, [B, T, Hkv, N] float32."""
    problem, x = operands(call)
    lse = None if call.scale is None else normalizers(problem, x)
    found = sums(problem, x, lse)[:, :, : call.q.shape[1], : call.blocks.shape[1]]
    return jnp.moveaxis(found, 1, 2)


def words(call: TopkCall, piece: int) -> tuple[Array, Array]:
    """The scores as whole numbers in the same order.

    Args:
      piece: numbers that are wanted together.

    Returns:
      int32 [B, Hkv, T, N], T of whole tiles and N of whole pieces, `NEVER` for what a query has no score for; and the bounds int32
      [B, tiles, 2] of what is there of each tile's rows, whole pieces. Between them all numbers are written.
    """
    problem, x = operands(call, piece)
    chunks = piece // problem.tiles.chunk
    first, end = x.bounds[..., 0] // chunks, -(-x.bounds[..., 1] // chunks)
    return sums(problem, x, None), jnp.stack([first, jnp.maximum(first, end)], axis=-1) * piece


def _num_parts(x: Array) -> int:
    return 1 if x.dtype == jnp.bfloat16 else 3


def _in_parts(x: Array) -> tuple[Array, ...]:
    """Arrays of bfloat16 whose sum is x."""
    if _num_parts(x) == 1:
        return (x,)
    found: list[Array] = []
    for _ in range(_num_parts(x)):
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        found.append(part.astype(jnp.bfloat16))
        x = x - part
    return tuple(found)


def normalizers(problem: Problem, x: Operands) -> Array:
    """log2 of the sum over what each query has scores for of exp(scale q_i . c_n), float32 [B, H, T]; any where there is nothing."""
    (batch, length, num_heads, depth), (of_queries, of_chunk) = x.q[0].shape, problem.parts
    chunk = COLUMNS // 2 if of_chunk > 1 else min(problem.tiles.chunk, COLUMNS)
    ratio = problem.tiles.chunk // chunk
    held, staged = 2 * of_queries * QUERIES * depth, 2 * of_chunk * chunk * depth
    room = gpu.MAX_SMEM - (4 << 10)
    together = 2 if problem.group % 2 == 0 and 2 * (held + staged) <= room else 1  # heads that read a chunk once
    stages = min(3, (room - together * held) // staged)

    def body(*refs: Any) -> None:
        q, c, (rows, tokens, limits, whole, out, q_tiles, ring, row_tile, arrived) = _split(problem, refs)
        b, i, pair, wg = (lax.axis_index(axis) for axis in ("batch", "tile", "heads", "warpgroup"))
        heads = [pair * together + j for j in range(together)]
        first, end = limits[b, i, 0] * ratio, limits[b, i, 1] * ratio

        @pl.when(wg == COMPUTE)
        def _load() -> None:
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            for source, tile in zip(q, q_tiles, strict=True):
                for j, h in enumerate(heads):
                    plgpu.copy_gmem_to_smem(source.at[b, pl.ds(i * QUERIES, QUERIES), h], tile.at[j], arrived)

            def copy(n: Array, _: None) -> None:
                at = (b, pl.ds((first + n) * chunk, chunk), lax.div(heads[0], jnp.int32(problem.group)))
                ring.fill(n, *(source.at[at] for source in c))

            lax.fori_loop(0, end - first, copy, None)
            ring.drain(end - first)

        @pl.when(wg < COMPUTE)
        def _compute() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            own = pl.ds(i * QUERIES + wg * ROWS, ROWS)
            plgpu.barrier_wait(arrived)
            queries = [[tile.at[j, pl.ds(wg * ROWS, ROWS)] for tile in q_tiles] for j in range(together)]

            def step(n: Array, state: tuple[tuple[Array, Array], ...]) -> tuple[tuple[Array, Array], ...]:
                start, found = (first + n) * chunk, []

                def hide(z: Array) -> Array:
                    visible = _visible(rows.at[b], tokens.at[b], own, pl.ds(start, chunk))
                    return jnp.where(visible, z, jnp.full_like(z, 2 * HIDDEN))

                columns = ring.read(n)
                for j, (of_head, (peak, total)) in enumerate(zip(queries, state, strict=True)):
                    z = _product(of_head, columns) * problem.unit
                    if j == together - 1:
                        ring.release(n)
                    z = lax.cond(whole[b, i, lax.div(first + n, jnp.int32(ratio))] == 1, lambda z: z, hide, z)
                    highest = jnp.maximum(peak, jnp.max(z, axis=1))
                    grown = jnp.sum(jnp.exp2(z - gpu.rows_to(highest, chunk)), axis=1)
                    found.append((highest, jnp.exp2(peak - highest) * total + grown))
                return tuple(found)

            state = ((gpu.full((ROWS,), HIDDEN), gpu.full((ROWS,), 0.0)),) * together
            for j, (peak, total) in enumerate(lax.fori_loop(0, end - first, step, state)):
                some = jnp.where(total > 0, total, gpu.full((ROWS,), 1.0))
                row_tile.at[wg, j][...] = peak + jnp.log2(some)
            plgpu.commit_smem()
            for j, h in enumerate(heads):
                plgpu.copy_smem_to_gmem(row_tile.at[wg, j], out.at[b, h, own])
            plgpu.wait_smem_to_gmem(0)

    arrays = (*x.q, *x.c, x.rows, x.tokens, x.bounds, x.whole)
    shape = jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32)
    pairs = batch * num_heads * length * x.c[0].shape[1] // 2
    return gpu.call(
        body,
        name="group_normalizers",
        sums_columns=False,
        out_type=shape,
        scratch_types=[
            tuple(gpu.tile((together, QUERIES, depth), jnp.bfloat16) for _ in range(of_queries)),
            gpu.ring(*(gpu.tile((stages, chunk, depth), jnp.bfloat16) for _ in range(of_chunk)), readers=COMPUTE),
            plgpu.SMEM((COMPUTE, together, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=of_queries * together),
        ],
        grid=(batch, length // QUERIES, num_heads // together),
        grid_names=("batch", "tile", "heads"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        cost=cost((*arrays, shape), flops=2 * pairs * depth * _num_products(problem), transcendentals=pairs),
    )(*arrays)


def sums(problem: Problem, x: Operands, lse: Array | None) -> Array:
    """The sums over the heads of a group, float32 [B, Hkv, T, N] and 0 for what a query has no score for, or words int32."""
    (batch, length, num_heads, width), (_, count, num_kv_heads, _) = x.q[0].shape, x.c[0].shape
    tiles, group = problem.tiles, problem.group
    of_rows = [row for row in (lse, x.weights) if row is not None]
    columns = min(tiles.chunk, COLUMNS)
    kind, nothing = (jnp.float32, 0) if problem.piece is None else (jnp.int32, NEVER)

    def body(*refs: Any) -> None:
        q, c, (rows, tokens, limits, *given, out, c_tiles, ring, staged, arrived) = _split(problem, refs)
        b, i, g, n, wg = (lax.axis_index(axis) for axis in ("batch", "tile", "group", "chunk", "warpgroup"))
        first, end = limits[b, i, 0], limits[b, i, 1]
        is_reached = (n >= first) & (n < end)
        own = pl.ds(i * QUERIES + wg * ROWS, ROWS)

        @pl.when((wg == COMPUTE) & is_reached)
        def _load() -> None:
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            for source, tile in zip(c, c_tiles, strict=True):
                plgpu.copy_gmem_to_smem(source.at[b, pl.ds(n * tiles.chunk, tiles.chunk), g], tile, arrived)

            def copy(h: Array, _: None) -> None:
                at = (b, pl.ds(i * QUERIES, QUERIES), g * group + h)
                ring.fill(h, *(source.at[at] for source in q))

            lax.fori_loop(0, group, copy, None)
            ring.drain(jnp.int32(group))

        def write(start: Any, x: Array) -> None:
            """x [64, columns] to the columns of the chunk from `start` on."""
            for column in range(0, columns, STAGED):
                staged.at[wg][...] = x[:, column : column + STAGED]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staged.at[wg], out.at[b, g, own, pl.ds(n * tiles.chunk + start + column, STAGED)])
                plgpu.wait_smem_to_gmem(0)

        @pl.when((wg < COMPUTE) & is_reached)
        def _compute() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            plgpu.barrier_wait(arrived)
            places = range(0, tiles.chunk, columns)

            def head(h: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
                row = gpu.rows_to(gpu.load(given[0].at[b, g * group + h, own], 0), columns) if given else None
                queries = [tile.at[pl.ds(wg * ROWS, ROWS)] for tile in ring.read(h)]
                found = []
                for start, total in zip(places, totals, strict=True):
                    z = _product(queries, [tile.at[pl.ds(start, columns)] for tile in c_tiles])
                    if row is not None:
                        z = row * jnp.maximum(z, 0) if problem.weighed else jnp.exp2(z * problem.unit - row)
                    found.append(total + z)
                ring.release(h)
                return tuple(found)

            totals = lax.fori_loop(0, group, head, tuple(gpu.full((ROWS, columns), 0.0) for _ in places))
            for start, total in zip(places, totals, strict=True):
                visible = _visible(rows.at[b], tokens.at[b], own, pl.ds(n * tiles.chunk + start, columns))
                shown = total if problem.piece is None else in_order(total)
                write(start, jnp.where(visible, shown, jnp.full_like(shown, nothing)))

        wanted = jnp.logical_not(is_reached)
        if problem.piece is not None:
            together = jnp.int32(problem.piece // tiles.chunk)
            own_piece = lax.div(n, together)
            wanted &= (own_piece >= lax.div(first, together)) & (own_piece < lax.div(end + (together - 1), together))

        @pl.when((wg < COMPUTE) & wanted)
        def _nothing() -> None:
            for start in range(0, tiles.chunk, columns):
                write(start, gpu.full((ROWS, columns), nothing, kind))

    arrays = (*x.q, *x.c, x.rows, x.tokens, x.bounds, *of_rows)
    shape = jax.ShapeDtypeStruct((batch, num_kv_heads, length, count), kind)
    pairs = batch * num_heads * length * count // 2
    of_queries, of_chunk = problem.parts
    return gpu.call(
        body,
        name="group_scores",
        sums_columns=False,
        out_type=shape,
        scratch_types=[
            tuple(gpu.tile((tiles.chunk, width), jnp.bfloat16) for _ in range(of_chunk)),
            gpu.ring(*(gpu.tile((tiles.stages, QUERIES, width), jnp.bfloat16) for _ in range(of_queries)), readers=COMPUTE),
            gpu.tile((COMPUTE, ROWS, STAGED), kind),
            plgpu.Barrier(num_arrivals=of_chunk),
        ],
        grid=(batch, length // QUERIES, num_kv_heads, count // tiles.chunk),
        grid_names=("batch", "tile", "group", "chunk"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        cost=cost(
            (*arrays, shape),
            flops=2 * pairs * width * _num_products(problem),
            transcendentals=0 if problem.scale is None else pairs,
        ),
    )(*arrays)


def _split(problem: Problem, refs: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """The parts of q, those of what is scored, and the rest."""
    of_queries, of_chunk = problem.parts
    return refs[:of_queries], refs[of_queries : of_queries + of_chunk], refs[of_queries + of_chunk :]


def _visible(rows: Any, tokens: Any, own: Any, columns: Any) -> Array:
    """bool [64, N]: what these queries have scores for; of rows and tokens [2, ...]."""
    row = lambda which: gpu.rows_to(gpu.load(rows.at[which, own], 0), columns.size)
    column = lambda which: gpu.columns_to(gpu.load(tokens.at[which, columns], 1), ROWS)
    return (row(0) == column(0)) & (column(1) <= row(1))


def _product(queries: list[Any], columns: list[Any]) -> Array:
    """Float32 [64, N] of the parts of queries [64, K] and of what is scored [N, K]."""
    pairs = [(q, c) for i, q in enumerate(queries) for j, c in enumerate(columns) if i + j < 3]

    def multiply(acc: Any) -> Array:
        for q, c in pairs:
            plgpu.wgmma(acc, q, c.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((ROWS, columns[0].shape[0]), jnp.float32))


def _num_products(problem: Problem) -> int:
    return sum(i + j < 3 for i in range(problem.parts[0]) for j in range(problem.parts[1]))


def in_order(x: Array) -> Array:
    """Whole numbers in the order of float32 numbers, none the least there is; of both zeros the same."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, jnp.zeros_like(x), x), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
