"""The chunks of the tokens that queries choose one by one, for TPU kernels whose memory is a table of rows.

What is chosen from lies in the core's memory as a table of rows. A query brings the rows that it has chosen together, a chunk at a time,
while the products of the chunk before are made, so that work follows the tokens that are chosen.
A row that nobody sees has a number in a channel of its own that hides it, and stands where there is nothing to choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.attention.tpu.tokens.tables import LANES, QUERIES, Problem
from plait.kernels.costs import cost

Array = jax.Array


class Chunks(NamedTuple):
    """The chunks of a grid step's queries, one after the other, each fetched while that before is worked on."""

    problem: Problem
    bounds: Any
    """Of `listed`."""
    lists: Any
    """Its entries, of this grid step and of the next. It lies where an instruction that reads a number has the constant part of its address;
    a list that came by itself would take one more instruction a row."""
    table: Any
    buffer: Any
    """The rows of a chunk as they lie in the table."""
    here: Any
    """[tiles, C / packing, 128] words: as the products read them."""
    moved: Any
    """What says that copies are done: of the two lists, and of the table."""
    first: Any
    """Where this step's list begins."""

    @classmethod
    def begin(cls, problem: Problem, bounds: Any, entries: Any, far: Any, memory: Sequence[Any]) -> Chunks:
        """Ahead of all else, in the memory of `_row_scratch`: at a sequence's first step its table of `far` comes here, and at each the list
        of the next among `entries`."""
        steps, (lists, table, buffer, here, moved) = pl.num_programs(1), memory
        step = pl.program_id(0) * steps + pl.program_id(1)
        first = lambda step: lax.rem(step, 2) * entries.shape[3]

        def of(step: Any) -> Any:
            slot = lists.at[pl.ds(first(step), entries.shape[3])]
            of_step = entries.at[lax.div(step, steps), lax.rem(step, steps), 0]
            return pltpu.make_async_copy(of_step, slot, moved.at[lax.rem(step, 2)])

        chunks = cls(problem, bounds, lists, table, buffer, here, moved, first(step))
        pl.when(step == 0)(lambda: of(step).start())
        pl.when(step + 1 < pl.num_programs(0) * steps)(lambda: of(step + 1).start())
        sequence, new = pl.program_id(0), pl.program_id(1) == 0
        pl.when(new)(lambda: chunks.copy(far.at[sequence], chunks.table))
        of(step).wait()
        return chunks

    def copy(self, source: Any, to: Any) -> None:
        """A table comes or goes, and is waited for."""
        copy = pltpu.make_async_copy(source, to, self.moved.at[2])
        copy.start()
        copy.wait()

    def low(self, i: Any) -> Array:
        return self.bounds[0, 0, 0, 2 * i]

    def high(self, i: Any) -> Array:
        return self.bounds[0, 0, 0, 2 * i + 1]

    def num_chunks(self) -> Array:
        """Of this step's queries."""
        of = lambda i: lax.div(self.high(i) - self.low(i), jnp.int32(self.problem.chunk))
        return sum((of(i) for i in range(QUERIES)), jnp.int32(0))

    def rows(self, i: Array, c: Array) -> Callable[[int], Array]:
        """The line at which the row of the n-th chosen token of a chunk begins."""
        total = self.lists.shape[0]
        start = self.first + i * (total // (2 * QUERIES)) + c
        return lambda n: self.lists.at[pl.ds(n, total - n)][start]

    def lanes(self, c: Array) -> Any:
        """Where chunk c stands among the chosen tokens of a query, for aligned chunks of whole lines."""
        return pl.ds(pl.multiple_of(c, LANES), self.problem.chunk)

    def move(self, i: Array, c: Array, sums: Sums | None = None, *earlier: Array) -> None:
        """The rows of a chunk come to the buffer as they lie, while what was put of an earlier one is added to the sums."""
        words, rows = self.problem.words, self.rows(i, c)
        for members in self.problem.batches:
            moved = [] if sums is None else sums.added_to(members, *earlier)
            moved += [(self.buffer, pl.ds(n * words, words), self.table[pl.ds(rows(n), words)]) for n in members]
            for to, at, x in moved:
                to[at] = x

    def unpack(self) -> None:
        """What is fetched, as the products read it."""
        words = self.problem.words
        packing = self.problem.packing
        for first in range(0, self.problem.chunk, 8 * packing):
            for word in range(words):
                lines = [self.buffer[pl.ds((first + part) * words + word, 8, packing * words)] for part in range(packing)]
                for part, tile in enumerate(_unpacked(lines)):
                    if (n := word * packing + part) < self.problem.tiles:
                        self.here[n, first // packing : first // packing + 8] = tile

    def keys(self) -> Array:
        """What is unpacked, [C, W]."""
        tiles = [pltpu.bitcast(self.here[n], jnp.dtype(self.problem.dtype)) for n in range(self.problem.tiles)]
        return jnp.concatenate(tiles, axis=1)

    def each(
        self,
        visit: Callable[[Array, Array, Array], None],
        finish: Callable[[Array], None] = lambda i: None,
        nothing: Callable[[], None] = lambda: None,
        sums: Sums | None = None,
    ) -> None:
        """`visit(i, c, k)` for each chunk of each query i, which begins at its chosen token c and has rows k, and `finish(i)` after a
        query's last; or `nothing()` where there is no chunk.

        What a visit puts to the `sums`, and the rows of the next chunk, the compiler moves while it makes the products of this one. Where
        there are sums it has enough to move at a visit's begin, so that rows are unpacked behind it, else ahead of it.
        """
        size, count = self.problem.chunk, self.num_chunks()

        def step(_: Array, at: tuple[Array, ...]) -> tuple[Array, ...]:
            i, c, *earlier = at
            last = c + size >= self.high(i)
            following = jnp.where(last, jnp.minimum(i + 1, QUERIES - 1), i)
            then = following, jnp.where(last, self.low(following), c + size)
            if sums is None:
                self.unpack()
            self.move(*then, sums, *earlier)
            visit(i, c, self.keys())
            if sums is not None:
                self.unpack()
            pl.when(last)(partial(finish, i))
            return *then, i, c

        @pl.when(count > 0)
        def _visits():
            begin = jnp.int32(0), self.low(0)
            self.move(*begin)
            if sums is not None:
                self.unpack()
            *_, i, c = lax.fori_loop(0, count, step, (*begin, *begin))
            if sums is not None:
                sums.add(i, c)

        pl.when(count == 0)(nothing)


class Sums(NamedTuple):
    """Sums of the gradients of a table's rows, behind each. No query may choose a token twice."""

    chunks: Chunks
    added: Any
    """Those of the chunk that was visited last."""

    def begin(self) -> None:
        """Ahead of the visits."""
        self.added[...] = jnp.zeros_like(self.added)

    def put(self, n: int, tile: Array) -> None:
        """The n-th 128 channels of the gradients [C, 128] of a chunk's rows."""
        tiles = self.chunks.problem.tiles
        for m in range(0, tile.shape[0], 8):
            self.added[pl.ds(m * tiles + n, 8, tiles)] = tile[m : m + 8]

    def added_to(self, members: range, i: Array, c: Array) -> list[Any]:
        """Where the sums of some rows of chunk c of query i are, and with what was put."""
        problem, rows = self.chunks.problem, self.chunks.rows(i, c)
        table, where = self.chunks.table, [pl.ds(rows(m) + problem.words, problem.tiles) for m in members]
        put = [self.added[pl.ds(m * problem.tiles, problem.tiles)] for m in members]
        return [
            (table, at, pltpu.bitcast(pltpu.bitcast(table[at], jnp.float32) + x, jnp.int32))
            for at, x in zip(where, put, strict=True)
        ]

    def add(self, i: Array, c: Array) -> None:
        """What was put, of chunk c of query i, to the sums."""
        for members in self.chunks.problem.batches:
            for to, at, x in self.added_to(members, i, c):
                to[at] = x

    def end(self, d_table: Any) -> None:
        """Behind the visits: at a sequence's last step the table leaves, with its sums."""

        sequence, last = pl.program_id(0), pl.program_id(1) == pl.num_programs(1) - 1
        pl.when(last)(lambda: self.chunks.copy(self.chunks.table, d_table.at[sequence]))


def _unpacked(lines: Sequence[Array]) -> list[Array]:
    """Words of tiles of 8 rows, or of 16 of two lines of words of 16-bit elements, in which rows of the two take turns."""
    if len(lines) == 1:
        return list(lines)
    a, b = lines
    return [(a & 0xFFFF) | (b << 16), lax.shift_right_logical(a, 16) | (b & jnp.int32(-65536))]


def own_column(columns: Array, i: Array) -> Array:
    """Column i of an array [N, 8], [N, 1]."""
    lane = lax.broadcasted_iota(jnp.int32, columns.shape, 1)
    return jnp.sum(jnp.where(lane == i, columns, 0), axis=1, keepdims=True)


def _row_scratch(problem: Problem, entries: int) -> list[Any]:
    """What `Chunks` keeps, from `lists` on, of a grid step with so many entries."""
    return [
        pltpu.SMEM((2 * entries,), jnp.int32),
        pltpu.VMEM((problem.table_rows * problem.pitch, LANES), jnp.int32),
        pltpu.VMEM((problem.chunk * problem.words, LANES), jnp.int32),
        pltpu.VMEM((problem.tiles, problem.chunk // problem.packing, LANES), jnp.int32),
        pltpu.SemaphoreType.DMA((3,)),
    ]


def sums_scratch(problem: Problem) -> list[Any]:
    """Of `Sums`."""
    return [pltpu.VMEM((problem.chunk * problem.tiles, LANES), jnp.float32)]


def sums_shape(problem: Problem, batch: int) -> jax.ShapeDtypeStruct:
    """The tables as they leave with their sums, [B, table_rows * pitch, 128]."""
    return jax.ShapeDtypeStruct((batch, problem.table_rows * problem.pitch, LANES), jnp.int32)


def call_kernel(
    kernel: Callable[..., None],
    name: str,
    queries: Sequence[Array],
    far: Array,
    lists: tuple[Array, Array],
    *,
    outputs: Sequence[Any],
    scratch: Sequence[Any],
    columns: int,
    problem: Problem,
    in_place: bool = False,
) -> Any:
    """Arrays of `queries` and `outputs` are [B, T, ...], but for the last output where there are sums, [B, ...].

    Args: `queries`, the first [B, T, H, width], of which the last is the first output's with `in_place`; `scratch` beside the chunks';
    `columns` of all products.
    """
    entries, bounds = lists
    batch, length, heads = queries[0].shape[:3]
    of_queries = lambda x: pl.BlockSpec((1, QUERIES, *x.shape[2:]), lambda b, t: (b, t, *[0] * (len(x.shape) - 2)))
    scalars = lambda x: pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, t: (b, t, 0, 0), memory_space=pltpu.SMEM)
    apart = pl.BlockSpec(memory_space=pl.ANY)
    out_specs = [of_queries(x) for x in outputs[:-1]] + [apart if problem.sums else of_queries(outputs[-1])]
    pairs = batch * length * heads * (entries.shape[3] // QUERIES)
    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=list(outputs),
        grid=(batch, length // QUERIES),
        in_specs=[scalars(bounds), apart, apart, *(of_queries(x) for x in queries)],
        out_specs=out_specs,
        scratch_shapes=[*_row_scratch(problem, entries.shape[3]), *scratch],
        input_output_aliases={2 + len(queries): 0} if in_place else {},
        cost_estimate=cost((*queries, far, *lists, *outputs), flops=2 * pairs * columns, transcendentals=pairs),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=problem.bytes + problem.besides
        ),
    )(bounds, entries, far, *queries)
