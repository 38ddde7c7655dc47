"""Rows of a memory as a table in a TPU core's memory, and lists of the rows that each query brings from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from plait.kernels.target import current

Array = jax.Array

LANES = 128
QUERIES = 8
"""Queries a grid step."""

CHUNK = 1024
"""Chosen tokens whose products are made at a time, at most; of gradients half."""

RESERVE = 8 << 20
"""Bytes of a core's memory beside a table and what is of the queries: a chunk's rows and products."""

LEAST = 512
"""Tokens for which a table has room at least."""

MIN_MEMORY = 64 << 20
"""Bytes of a core's memory that tables and what stands beside them need at least."""

BESIDES = {False: 250, True: 60}
"""Chosen tokens whose cycles a chunk takes besides its own, by whether there are sums; by static estimates for v5e and v6e."""

OF_TABLE = 200
"""Chosen tokens whose cycles one of several tables takes besides: a query comes and goes, and what it has from other tables, at v5e's and v6e's
bandwidth."""

MORE, SAMPLE = 4, 16
"""Numbers of tables that are compared, and queries for which they are."""

_HIDING = -1e30
"""q . k of a row that nobody sees."""


@dataclass(frozen=True)
class Problem:
    """One call: sizes that a kernel knows."""

    scale: float
    stats: bool
    heads: int
    key_dim: int
    value_dim: int
    dtype: str
    chunk: int
    """Chosen tokens a chunk, a multiple of 16."""
    rows: int
    """Tokens a table, of which there is one row more."""
    sums: bool
    """Whether float32 sums of a row's gradients follow it."""
    deep: bool = False
    """Whether products over the heads that are added are one product."""
    stride: int = 0
    """Tokens from the first of a table to that of the next, `rows` of one at most."""
    batch: int = 2
    """Rows that are read before the first is written."""
    hiding: bool = True
    """Whether a channel hides rows that nobody sees; without, they are zeros."""

    @property
    def packing(self) -> int:
        """Elements of a word of 32 bits."""
        return 4 // jnp.dtype(self.dtype).itemsize

    @property
    def tiles(self) -> int:
        """Tiles of 128 channels, one of which has room for what hides a row."""
        return -(-(self.key_dim + self.hiding) // LANES)

    @property
    def words(self) -> int:
        """Lines of 128 words of a row."""
        return -(-self.tiles // self.packing)

    @property
    def batches(self) -> list[range]:
        """Of a chunk's rows."""
        return [range(n, n + self.batch) for n in range(0, self.chunk, self.batch)]

    @property
    def pitch(self) -> int:
        """Lines from one row to the next, its sums behind it where there are any, so that one number finds both."""
        return self.words + (self.tiles if self.sums else 0)

    @property
    def width(self) -> int:
        """Channels as the products have them."""
        return self.tiles * LANES

    @property
    def table_rows(self) -> int:
        return -(-(self.rows + 1) // 8) * 8

    @property
    def bytes(self) -> int:
        """Of a core's memory that a table takes."""
        return self.table_rows * self.pitch * LANES * 4

    @property
    def besides(self) -> int:
        """Bytes that stand beside it: of a grid step's queries, their cotangents and float32 gradients, before and with those of this table,
        or outputs; twice, as those of the next come."""
        return RESERVE + 2 * QUERIES * self.heads * self.width * (2 * jnp.dtype(self.dtype).itemsize + (8 if self.sums else 4))


def table(problem: Problem, k: Array, hidden: Array) -> Array:
    """int32 [B, table_rows * pitch, 128] of rows k [B, S, K], S at most `rows`; those that are `hidden` [B, S] nobody sees.

    A word holds the same channel of neighbouring tiles, the first in its lower bits. Sums are zeros.
    """
    batch, length, key_dim = k.shape
    wide = jnp.pad(k, ((0, 0), (0, problem.table_rows - length), (0, problem.words * problem.packing * LANES - key_dim)))
    hidden = jnp.pad(hidden, ((0, 0), (0, problem.table_rows - length)), constant_values=True)
    if problem.hiding:
        hides = (jnp.arange(wide.shape[2]) == key_dim)[None, None] & hidden[..., None]
        wide = jnp.where(hides, jnp.asarray(_HIDING, k.dtype), wide)
    wide = wide.reshape(batch, problem.table_rows, problem.words, problem.packing, LANES)
    words = lax.bitcast_convert_type(jnp.moveaxis(wide, 3, 4) if problem.packing > 1 else wide[:, :, :, 0], jnp.int32)
    words = jnp.pad(words, ((0, 0), (0, 0), (0, problem.pitch - problem.words), (0, 0)))
    return words.reshape(batch, -1, LANES)


def repelled(problem: Problem, q: Array) -> Array:
    """q [B, T, H, width], which a hidden row repels."""
    rest = lambda channels, value: jnp.full((*q.shape[:3], channels), value, q.dtype)
    return jnp.concatenate([q, rest(1, 1), rest(problem.width - q.shape[3] - 1, 0)], axis=3)


class Part(NamedTuple):
    """A table, and what queries bring from it; or several, on a leading axis."""

    low: Array
    """The first token of the table, []."""
    begin: Array
    """Of a query's chosen tokens the first that this table brings, [B, T]."""
    end: Array
    """The first that it does not."""
    far: Array
    """The `table`."""


def cut_tables(problem: Problem, parts: int, rows: Array, k: Array, hidden: Array, *, aligned: bool = False) -> Part:
    """All tables of the keys k [B, S, K] and `hidden` [B, S].

    Args:
      rows: [B, T, N] of the keys that queries choose, ascending where there are several tables; -1 is none.
      aligned: chunks begin at multiples of a chunk among a query's tokens, and not at a table's first.
    """
    lows = [part * problem.stride for part in range(parts)]
    more = lows[-1] + problem.rows - k.shape[1]
    cut = lambda x: jnp.stack([x[:, low : low + problem.rows] for low in lows])
    k, hidden = jnp.pad(k, ((0, 0), (0, more), (0, 0))), jnp.pad(hidden, ((0, 0), (0, more)), constant_values=True)
    found = ends(problem, parts, rows, aligned=aligned)
    return Part(jnp.array(lows), found[:-1], found[1:], jax.vmap(partial(table, problem))(cut(k), cut(hidden)))


def ends(problem: Problem, parts: int, rows: Array, *, aligned: bool) -> Array:
    """Which of a query's chosen tokens each table brings, from one up to the next, int32 [parts + 1, B, T]: whole chunks, where the next table
    has the rows that are left."""
    count = rows.shape[2]
    if parts == 1:
        index = jnp.arange(count)[None, None]
        first = jnp.min(jnp.where(rows >= 0, index, count), axis=2)
        return jnp.stack([first, jnp.maximum(first, 1 + jnp.max(jnp.where(rows >= 0, index, -1), axis=2))])
    before = lambda row: jnp.sum(rows < row, axis=2)

    def following(begin: Array, part: Array) -> tuple[Array, Array]:
        low = part * problem.stride
        least, most = before(low + problem.stride), before(low + problem.rows)
        anchor = 0 if aligned else begin
        whole = anchor + (most - anchor) // problem.chunk * problem.chunk
        end = jnp.where(whole >= jnp.maximum(least, begin), whole, most)
        return end, end

    begin = before(0)
    rest = lax.scan(following, begin, jnp.arange(parts - 1))[1]
    return jnp.concatenate([begin[None], rest, jnp.full_like(begin, count)[None]])


def listed(problem: Problem, rows: Array, part: Part, *, aligned: bool = False) -> tuple[Array, Array]:
    """Of each query the lines at which its rows of a part's table begin, int32 [B, T / 8, 1, 8 L], and the chosen tokens from which and up to
    which chunks hold the part's, [B, T / 8, 1, 16]: at least one chunk, unless no query of the grid step has any.

    Args:
      rows, aligned: as in `cut_tables`.
    """
    batch, length, count = rows.shape
    size = problem.chunk
    wide = -(-count // size) * size
    rows = jnp.pad(rows, ((0, 0), (0, -length % QUERIES), (0, wide - count)), constant_values=-1)
    begin, end = (jnp.pad(x, ((0, 0), (0, -length % QUERIES))) for x in (part.begin, part.end))
    index = jnp.arange(wide, dtype=jnp.int32)[None, None]
    inside = (rows >= 0) & (index >= begin[..., None]) & (index < end[..., None])
    entries = problem.pitch * jnp.where(inside, rows - part.low, problem.rows)
    some = jnp.any((end > begin).reshape(batch, -1, QUERIES), axis=2)
    begin = begin // size * size if aligned else begin
    taken = jnp.where(jnp.repeat(some, QUERIES, axis=1), jnp.maximum(-(-(end - begin) // size), 1) * size, 0)
    begin = jnp.minimum(begin, wide - taken)
    by_step = lambda x: x.reshape(batch, -1, 1, QUERIES * x.shape[2])
    return by_step(entries), by_step(jnp.stack([begin, begin + taken], axis=2))


def deep(heads: int) -> bool:
    """Whether a matrix unit has room for all heads twice, in whole lines."""
    here = current()
    return here is not None and heads % LANES == 0 and 2 * heads <= here.matrix_unit


def batch() -> int:
    """Rows at a time: as many as hide that a read of the table waits for writes before it, and fewer where a core writes one a cycle."""
    here = current()
    return 8 if here is not None and here.matrix_unit > LANES else 2


@dataclass(frozen=True)
class Tables:
    """How the keys are cut into tables."""

    problem: Problem
    """But for the rows of one, its chunk the largest there may be."""
    tokens: int
    chosen: int
    """Tokens of a query."""
    memory: int
    """Bytes of a core's memory, of which an eighth is the compiler's."""
    step: int = 16
    """A chunk is a multiple of so many tokens."""

    def cut(self, *, gradients: bool) -> tuple[Problem, int]:
        """A table, and how many there are: neighbours share what rows there is room for, which either can bring. Of as few as can be and a few
        more, which share more, and of chunks by halves, what takes least."""
        problem, room = replace(self.problem, sums=gradients), self.room(gradients=gradients)
        least, most = -(-self.tokens // room), problem.chunk // (2 if gradients else 1)
        sizes = [self.step, *(most >> n for n in range(6) if (most >> n) % self.step == 0 and most >> n > self.step)]
        cuts = []
        for parts in range(least, least + (1 if least == 1 else MORE)):
            stride = -(-self.tokens // (8 * parts)) * 8
            rows = stride if parts == 1 else min(room // 8 * 8, 2 * stride)
            cuts += [(replace(problem, rows=rows, stride=stride, chunk=size), parts) for size in sizes]
        return min(cuts, key=lambda cut: self._work(*cut))

    def room(self, *, gradients: bool) -> int:
        """Tokens that a table has room for."""
        problem = replace(self.problem, sums=gradients)
        one = replace(problem, rows=7).bytes // 8
        return (self.memory * 7 // 8 - problem.besides) // one - 8

    def _work(self, problem: Problem, parts: int) -> float:
        """Chosen tokens whose cycles a query takes, the mean over a causal row that chooses evenly, as `ends` shares them out."""
        chunks, size = 0, problem.chunk
        for n in range(SAMPLE):
            reach = self.tokens * (n + 1) / SAMPLE
            chosen, begin = min(self.chosen, reach), 0.0
            for low in range(0, math.ceil(reach), problem.stride):
                least, most = (min(chosen, chosen * (low + to) / reach) for to in (problem.stride, problem.rows))
                whole = begin + (most - begin) // size * size
                end = whole if whole >= max(least, begin) else most
                chunks += math.ceil((end - begin) / size - 1e-6)
                begin = end
        return (size + BESIDES[problem.sums]) * chunks / SAMPLE + OF_TABLE * parts


def sums_of(problem: Problem, tables: Array) -> Array:
    """The sums of all tokens' gradients, float32 [B, parts * stride, width], in tables [parts, B, table_rows * pitch, 128] of words."""
    parts, batch = tables.shape[:2]
    lines = tables.reshape(parts, batch, problem.table_rows, problem.pitch, LANES)[:, :, : problem.rows, problem.words :]
    sums = lax.bitcast_convert_type(lines, jnp.float32).reshape(parts, batch, problem.rows, problem.width)
    own, shared = sums[:, :, : problem.stride], sums[:-1, :, problem.stride :]
    own = own.at[1:, :, : shared.shape[2]].add(shared)
    return jnp.moveaxis(own, 0, 1).reshape(batch, -1, problem.width)


def whole(x: Array) -> Array:
    """[B, T, ...] to a multiple of what a grid step takes."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % QUERIES)] + [(0, 0)] * (x.ndim - 2))
