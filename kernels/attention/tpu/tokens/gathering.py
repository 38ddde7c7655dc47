"""The kernels of attention of all heads to tokens that each query chooses one by one, for TPU: forward and gradients.

What the heads share lies in the core's memory as a table of rows. A query brings the rows that it has chosen together, a chunk at a time,
while the products of the chunk before are made; its heads are the rows of these products, so that work follows the tokens that are chosen.
A row that nobody sees has a number in a channel of its own that hides it, and stands where there is nothing to choose. Gradients of the
rows are float32 sums in the core's memory, to which a chunk's are added row by row; that is why no query may choose a token twice.
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

from plait.kernels.attention.reference import MASKED as HIDDEN
from plait.kernels.attention.tpu.tokens.tables import LANES, QUERIES, Problem
from plait.kernels.attention.tpu.weights import LOG2_E, NN, NT, dot
from plait.kernels.costs import cost

Array = jax.Array

BATCH = 8
"""Rows whose sums are read before the first is written back."""

_LOWEST = -1e20
"""The largest q . k before a row is seen."""

RESERVE = 24 << 20
"""Bytes of a core's memory beside tables and their sums."""


class _Chunks(NamedTuple):
    """The chunks of a grid step's queries, one after the other, each fetched while that before is worked on."""

    problem: Problem
    entries: Any
    bounds: Any
    """With `entries`, the lists of `listed`."""
    table: Any
    buffer: Any
    """The rows of a chunk as they lie in the table."""
    here: Any
    """[C, W]: as the products read them."""

    def low(self, i: Any) -> Array:
        return self.bounds[0, 0, 0, 2 * i]

    def high(self, i: Any) -> Array:
        return self.bounds[0, 0, 0, 2 * i + 1]

    def row(self, i: Array, c: Array, n: int) -> Array:
        """The line at which the row of the n-th chosen token of a chunk begins."""
        length = self.entries.shape[3] // QUERIES
        return self.entries[0, 0, 0, i * length + c * self.problem.chunk + n]

    def fetch(self, i: Array, c: Array) -> None:
        """The rows of a chunk, as they lie."""
        words = self.problem.words
        for n in range(self.problem.chunk):
            self.buffer[pl.ds(n * words, words)] = self.table[pl.ds(self.row(i, c, n), words)]

    def unpack(self) -> None:
        """What is fetched, as the products read it."""
        words = self.problem.words
        tiles: list[list[Array]] = [[] for _ in range(words * self.problem.packing)]
        for first in range(0, self.problem.chunk, 8 * self.problem.packing):
            for word in range(words):
                lines = [self.buffer[pl.ds((first + 8 * part) * words + word, 8, words)] for part in range(self.problem.packing)]
                for part, tile in enumerate(_unpacked(lines, self.here.dtype)):
                    tiles[word * self.problem.packing + part].append(tile)
        for n in range(self.problem.tiles):
            self.here[:, n * LANES : (n + 1) * LANES] = jnp.concatenate(tiles[n])

    def member(self, m: int) -> int:
        """Which of a chunk's tokens stands in row m of `here`."""
        group, at = divmod(m, 8 * self.problem.packing)
        line, part = divmod(at, self.problem.packing)
        return group * 8 * self.problem.packing + 8 * part + line

    def each(
        self,
        visit: Callable[[Array, Array, Array], None],
        finish: Callable[[Array], None],
        before: Callable[[Array, Array], None] = lambda i, c: None,
    ) -> None:
        """`visit(i, first, k)` for each chunk of each query i, whose rows are k, and `finish(i)` after a query's last.

        `before(i, c)` stands ahead of a visit, with the chunk that was visited last, of the first visit its own. What it writes, and the
        rows of the next chunk, the compiler moves while it makes the products of this one.
        """
        count = sum(self.high(i) - self.low(i) for i in range(QUERIES))
        self.fetch(jnp.int32(0), self.low(0))
        self.unpack()

        def step(_: Array, at: tuple[Array, ...]) -> tuple[Array, ...]:
            i, c, *earlier = at
            last = c + 1 >= self.high(i)
            following = jnp.where(last, jnp.minimum(i + 1, QUERIES - 1), i)
            then = following, jnp.where(last, self.low(following), c + 1)
            before(*earlier)
            self.fetch(*then)
            visit(i, c == self.low(i), self.here[...])
            self.unpack()
            pl.when(last)(partial(finish, i))
            return *then, i, c

        begin = jnp.int32(0), self.low(0)
        *_, i, c = lax.fori_loop(0, count, step, (*begin, *begin))
        before(i, c)


def _unpacked(lines: Sequence[Array], dtype: Any) -> list[Array]:
    """Tiles of 8 rows, or of 16 of two lines of words of 16-bit elements, in which rows of the two take turns."""
    if len(lines) == 1:
        return [pltpu.bitcast(lines[0], dtype)]
    a, b = lines
    low = (a & 0xFFFF) | (b << 16)
    high = lax.shift_right_logical(a, 16) | (b & jnp.int32(-65536))
    return [pltpu.bitcast(low, dtype), pltpu.bitcast(high, dtype)]


def _copy(source: Any, to: Any, done: Any) -> None:
    copy = pltpu.make_async_copy(source, to, done)
    copy.start()
    copy.wait()


def _forward_kernel(problem: Problem, bounds: Any, entries: Any, far: Any, q: Any, o: Any, found: Any, *scratch: Any) -> None:
    table, buffer, here, moved, acc, peak, total, spread = scratch

    @pl.when(pl.program_id(1) == 0)
    def _begin():
        _copy(far.at[pl.program_id(0)], table, moved)
        acc[...] = jnp.zeros_like(acc)

    chunks = _Chunks(problem, entries, bounds, table, buffer, here)
    bits = problem.scale * LOG2_E

    def visit(i: Array, first: Array, k: Array) -> None:
        z = dot(q[0, i], k, NT)  # [H, C]
        old = jnp.where(first, _LOWEST, peak[:, :1])
        highest = jnp.maximum(old, jnp.max(z, axis=1, keepdims=True))
        exponents, rise = bits * (z - highest), bits * (highest - old)
        p, keep = jnp.exp2(exponents), jnp.where(first, 0, jnp.exp2(-rise))
        mass = jnp.where(first, 0, total[:, :1])
        if problem.stats:
            gained = jnp.sum(jnp.where(p > 0, p * exponents, 0), axis=1, keepdims=True)
            spread[...] = jnp.broadcast_to(jnp.where(first, 0, keep * (spread[:, :1] - rise * mass)) + gained, spread.shape)
        total[...] = jnp.broadcast_to(keep * mass + jnp.sum(p, axis=1, keepdims=True), total.shape)
        peak[...] = jnp.broadcast_to(highest, peak.shape)
        acc[...] = keep * acc[...] + dot(p.astype(k.dtype), k[:, : problem.value_dim], NN)

    def finish(i: Array) -> None:
        mass = total[:, :1]
        some = mass > 0
        mass = jnp.where(some, mass, 1)
        o[0, i] = (acc[...] / mass).astype(o.dtype)
        log_mass, top = jnp.log(mass), problem.scale * peak[:, :1]
        columns = [jnp.where(some, log_mass + top, HIDDEN)]
        if problem.stats:
            columns += [jnp.where(some, top, HIDDEN), jnp.where(some, log_mass - spread[:, :1] / (LOG2_E * mass), 0)]
        lane = lax.broadcasted_iota(jnp.int32, total.shape, 1)
        tile = jnp.zeros_like(lane, jnp.float32)
        for n, column in enumerate(columns):
            tile = jnp.where(lane == n, column, tile)
        found[0, i] = tile.T[: found.shape[2]]

    chunks.each(visit, finish)


def _gradients_kernel(problem: Problem, bounds: Any, entries: Any, far: Any, *refs: Any) -> None:
    q, d_o, rows, d_q, d_table, table, buffer, here, moved, sums, added, acc = refs

    @pl.when(pl.program_id(1) == 0)
    def _begin():
        _copy(far.at[pl.program_id(0)], table, moved)
        lines = 8 * problem.pitch

        def clear(n: Array, _: None) -> None:
            sums[pl.ds(n * lines, lines)] = jnp.zeros((lines, LANES), jnp.float32)

        lax.fori_loop(0, problem.table_rows // 8, clear, None)

    chunks, tiles = _Chunks(problem, entries, bounds, table, buffer, here), problem.tiles

    def add(i: Array, c: Array) -> None:
        """The rows of `added`, of a chunk, to their sums."""
        for begin in range(0, problem.chunk, BATCH):
            members = range(begin, begin + BATCH)
            where = [pl.ds(chunks.row(i, c, chunks.member(m)), tiles) for m in members]
            found = [sums[at] + added[pl.ds(m * tiles, tiles)] for m, at in zip(members, where, strict=True)]
            for at, x in zip(where, found, strict=True):
                sums[at] = x

    def visit(i: Array, first: Array, k: Array) -> None:
        of_query = q[0, i]
        z = dot(k, of_query, NT)  # [C, H]
        of_rows, of_o = rows[0, i], d_o[0, i]
        exponents = (problem.scale * LOG2_E) * z - of_rows[0:1]
        weights = jnp.exp2(exponents)
        d_weights = dot(k[:, : problem.value_dim], of_o, NT) + of_rows[1:2]
        if problem.stats:
            d_weights -= of_rows[2:3] * jnp.where(weights > 0, exponents, 0)
        d_logits = d_weights * weights
        if problem.stats:
            d_logits += jnp.where(z >= of_rows[4:5], of_rows[3:4], 0)
        d_logits = d_logits.astype(k.dtype)
        acc[...] = jnp.where(first, 0, acc[...]) + dot(d_logits.T, k, NN)  # [H, W]
        d_k = problem.scale * dot(d_logits, of_query, NN)
        d_v = dot(weights.astype(of_o.dtype), of_o, NN)
        for n in range(tiles):
            at = slice(n * LANES, (n + 1) * LANES)
            tile, values = d_k[:, at], d_v[:, at]
            if n * LANES < problem.value_dim:
                tile += jnp.pad(values, ((0, 0), (0, LANES - values.shape[1])))
            for m in range(0, problem.chunk, 8):
                added[pl.ds(m * tiles + n, 8, tiles)] = tile[m : m + 8]

    def finish(i: Array) -> None:
        d_q[0, i] = (problem.scale * acc[...]).astype(d_q.dtype)

    added[...] = jnp.zeros_like(added)
    chunks.each(visit, finish, before=add)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _end():
        _copy(sums, d_table.at[pl.program_id(0)], moved)


def forward(problem: Problem, q: Array, far: Array, entries: Array, bounds: Array, dtype: Any) -> tuple[Array, Array]:
    """o [B, T, H, V] of a dtype, and float32 rows [B, T, 1 or 3, H]: lse and, with statistics, maximum and entropy.

    Args:
      q: [B, T, H, width], of `repelled`; T is a multiple of 8.
      far: the `table`.
      entries, bounds: of `listed`.
    """
    batch, length, heads, width = q.shape
    found = 3 if problem.stats else 1
    state = [pltpu.VMEM((heads, problem.value_dim), jnp.float32), *[pltpu.VMEM((heads, LANES), jnp.float32)] * 3]
    return _call(
        partial(_forward_kernel, problem),
        "chosen_tokens_forward",
        (q,),
        far,
        (entries, bounds),
        outputs=[
            jax.ShapeDtypeStruct((batch, length, heads, problem.value_dim), dtype),
            jax.ShapeDtypeStruct((batch, length, found, heads), jnp.float32),
        ],
        scratch=[*_rows(problem, q.dtype), *state],
        columns=width + problem.value_dim,
        problem=problem,
    )


def gradients(
    problem: Problem, q: Array, d_o: Array, rows: Array, far: Array, entries: Array, bounds: Array, dtype: Any
) -> tuple[Array, Array]:
    """Those of q, [B, T, H, width] of a dtype, and of the table's rows, float32 [B, table_rows, width], from d_o [B, T, H, V].

    The float32 rows [B, T, R, H] are those of `weights.stacked_rows`; other arguments as in `forward`.
    """
    batch, _, heads, width = q.shape
    lines = problem.table_rows * problem.pitch
    d_q, d_table = _call(
        partial(_gradients_kernel, problem),
        "chosen_tokens_gradients",
        (q, d_o, rows),
        far,
        (entries, bounds),
        outputs=[jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((batch, lines, LANES), jnp.float32)],
        scratch=[
            *_rows(problem, q.dtype),
            pltpu.VMEM((lines, LANES), jnp.float32),
            pltpu.VMEM((problem.chunk * problem.tiles, LANES), jnp.float32),
            pltpu.VMEM((heads, width), jnp.float32),
        ],
        columns=3 * width + 2 * problem.value_dim,
        problem=problem,
    )
    return d_q, d_table.reshape(batch, problem.table_rows, width)


def _rows(problem: Problem, dtype: Any) -> list[Any]:
    """The table, the chunk that is fetched as it lies there, and as the products read it; and what says that a copy is done."""
    return [
        pltpu.VMEM((problem.table_rows * problem.pitch, LANES), jnp.int32),
        pltpu.VMEM((problem.chunk * problem.words, LANES), jnp.int32),
        pltpu.VMEM((problem.chunk, problem.width), dtype),
        pltpu.SemaphoreType.DMA(()),
    ]


def _call(
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
) -> Any:
    """Arrays of `queries` and `outputs` are [B, T, ...], but for the last output where there are sums, [B, ...].

    Args: `columns` of all products.
    """
    entries, bounds = lists
    batch, length, heads = queries[0].shape[:3]
    of_queries = lambda x: pl.BlockSpec((1, QUERIES, *x.shape[2:]), lambda b, t: (b, t, 0, 0))
    scalars = lambda x: pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, t: (b, t, 0, 0), memory_space=pltpu.SMEM)
    apart = pl.BlockSpec(memory_space=pl.ANY)
    out_specs = [of_queries(x) for x in outputs[:-1]] + [apart if problem.sums else of_queries(outputs[-1])]
    pairs = batch * length * heads * (entries.shape[3] // QUERIES)
    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=list(outputs),
        grid=(batch, length // QUERIES),
        in_specs=[scalars(bounds), scalars(entries), apart, *(of_queries(x) for x in queries)],
        out_specs=out_specs,
        scratch_shapes=list(scratch),
        cost_estimate=cost((*queries, far, *lists, *outputs), flops=2 * pairs * columns, transcendentals=pairs),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=problem.bytes + RESERVE
        ),
    )(bounds, entries, far, *queries)
