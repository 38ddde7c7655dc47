"""Rows of a memory as a table in a TPU core's memory, and lists of the rows that each query brings from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

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

RESERVE = 24 << 20
"""Bytes of a core's memory beside tables and their sums."""

MIN_MEMORY = 64 << 20
"""Bytes of a core's memory that tables and what stands beside them need at least."""

BESIDES = 160
"""Chosen tokens whose cycles a chunk takes besides its own, by static estimates for v5e and v6e."""

_HIDING = -1e30
"""q . k of a row that nobody sees."""


@dataclass(frozen=True)
class Problem:
    """One call: sizes that a kernel knows."""

    scale: float
    stats: bool
    key_dim: int
    value_dim: int
    dtype: str
    chunk: int
    """Chosen tokens a chunk, a multiple of 16."""
    rows: int
    """Tokens a table, of which there is one row more."""
    sums: bool
    """Whether there are sums of the rows' gradients beside the table."""
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
    def pitch(self) -> int:
        """Lines from one row to the next, those of its sums where there are any, so that one number finds both."""
        return self.tiles if self.sums else self.words

    @property
    def width(self) -> int:
        """Channels as the products have them."""
        return self.tiles * LANES

    @property
    def table_rows(self) -> int:
        return -(-(self.rows + 1) // 8) * 8

    @property
    def bytes(self) -> int:
        """Of a core's memory that table and sums take."""
        return self.table_rows * self.pitch * LANES * 4 * (2 if self.sums else 1)


def table(problem: Problem, k: Array, hidden: Array) -> Array:
    """int32 [B, table_rows * pitch, 128] of rows k [B, S, K], S at most `rows`; those that are `hidden` [B, S] nobody sees.

    A word holds the same channel of neighbouring tiles, the first in its lower bits.
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


def listed(problem: Problem, rows: Array, low: Array, *, aligned: bool = False) -> tuple[Array, Array]:
    """Of each query the lines at which its rows of the table from row `low` on begin, int32 [B, T / 8, 1, 8 L], and the chosen tokens from
    which and up to which chunks hold those that are not hidden, at least one chunk, [B, T / 8, 1, 16].

    Args:
      rows: [B, T, N] of the whole memory; -1 is none.
      aligned: chunks begin at multiples of a chunk. Else the first begins at the table's first token, and there are as few as can be.
    """
    batch, length, count = rows.shape
    size = problem.chunk
    wide = -(-count // size) * size
    rows = jnp.pad(rows, ((0, 0), (0, -length % QUERIES), (0, wide - count)), constant_values=-1)
    inside = (rows >= low) & (rows < low + problem.rows)
    index = jnp.arange(wide, dtype=jnp.int32)[None, None]
    last = jnp.max(jnp.where(inside, index, 0), axis=2)
    first = jnp.minimum(jnp.min(jnp.where(inside, index, wide - 1), axis=2), last)
    first = first // size * size if aligned else first
    taken = ((last - first) // size + 1) * size
    begin = jnp.minimum(first, wide - taken)
    entries = problem.pitch * jnp.where(inside, rows - low, problem.rows)
    by_step = lambda x: x.reshape(batch, -1, 1, QUERIES * x.shape[2])
    return by_step(entries), by_step(jnp.stack([begin, begin + taken], axis=2))


def core_memory() -> int:
    """Bytes that a core has."""
    here = current()
    return MIN_MEMORY if here is None else here.vector_memory


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
        """A table, and how many there are."""
        problem = replace(self.problem, sums=gradients)
        parts = -(-self.tokens // self.rows(problem))
        chunk = self._chunk(parts, problem.chunk // (2 if gradients else 1))
        return replace(problem, rows=-(-self.tokens // (8 * parts)) * 8, chunk=chunk), parts

    def rows(self, problem: Problem) -> int:
        """Tokens that a table has room for."""
        one = replace(problem, rows=7).bytes // 8
        return (self.memory * 7 // 8 - RESERVE) // one - 8

    def _chunk(self, parts: int, most: int) -> int:
        """Of the most by halves what takes least: of several tables each has half a chunk in vain, on average."""
        sizes = [self.step, *(most >> n for n in range(6) if (most >> n) % self.step == 0 and most >> n > self.step)]
        in_vain = parts / 2 if parts > 1 else 0
        return min(sizes, key=lambda size: (1 + BESIDES / size) * (1 + in_vain * size / self.chosen))


def cut_tables(problem: Problem, parts: int, k: Array, hidden: Array) -> tuple[Array, Array]:
    """The first key of each table, [parts], and the tables, [parts, B, ...]."""
    more = parts * problem.rows - k.shape[1]
    cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0], parts, problem.rows, *x.shape[2:]), 1, 0)
    k, hidden = jnp.pad(k, ((0, 0), (0, more), (0, 0))), jnp.pad(hidden, ((0, 0), (0, more)), constant_values=True)
    return problem.rows * jnp.arange(parts), jax.vmap(partial(table, problem))(cut(k), cut(hidden))


def whole(x: Array) -> Array:
    """[B, T, ...] to a multiple of what a grid step takes."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % QUERIES)] + [(0, 0)] * (x.ndim - 2))
