"""The largest of a row of whole numbers for Hopper (Mosaic GPU), without a sort: as bits, and from them in the order of the row.

A block of threads is one row, of which as much lies in shared memory as fits there. The least number that is chosen is found some bits at a
time, by counting how many reach each of several thresholds; of those that equal it, where they are too many, the later ones likewise by
their places.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels import gpu
from plait.kernels.costs import cost

Array = jax.Array

BITS = 32
"""Numbers a word of bits."""

WORDS = 64
"""Words of bits that are made at a time."""

PIECE = WORDS * BITS
"""Numbers at a time; where parts of rows are read, they are whole pieces."""

LEAST_PART = 256
"""Rows are multiples of it."""

NEVER = -(1 << 31)
"""Below all numbers; never chosen."""

RESERVE = 4 << 10
"""Bytes of shared memory beside a row and its bits."""

MAX_BARRIERS = 32
"""That a block of threads can have of a kind."""

MAX_LENGTH = 256 * PIECE
"""Numbers of a row whose bits one copy writes."""


class Problem(NamedTuple):
    """What the kernel is specialised to."""

    length: int
    """Numbers a row."""
    top_k: int
    tile: int
    """Rows with the same bounds."""

    @property
    def size(self) -> int:
        """Numbers that are counted at a time."""
        return min(self.length, PIECE)

    @property
    def pieces(self) -> int:
        return -(-self.length // PIECE)

    @property
    def held(self) -> int:
        """Pieces in shared memory, at most; others are read from memory each time."""
        room = gpu.MAX_SMEM - RESERVE - 4 * WORDS * self.pieces
        return min(self.pieces, room // (4 * PIECE), MAX_BARRIERS)

    @property
    def digit(self) -> int:
        """Bits that are found at a time: more where each time reads from memory."""
        return 2 if self.held == self.pieces else 3


def largest_bits(x: Array, top_k: int, bounds: Array | None = None) -> Array:
    """Which numbers are chosen, bit i % 32 of word i // 32: the top_k largest above `NEVER`, of equal ones the later.

    Args:
      x: int32 [R, S], S a multiple of 256, and above 2,048 of that; at most `MAX_LENGTH`.
      top_k: as many of each row, at least 1, or all that are there.
      bounds: int32 [tiles, 2]: of a tile of R / tiles rows the first number that is read, and the one after the last, multiples of 2,048;
        others are not there, whatever they are. None reads all.

    Returns:
      int32 [R, S / 32].
    """
    rows, length = x.shape
    if bounds is None:
        bounds = jnp.asarray([[0, length]], jnp.int32)
    problem = Problem(length, top_k, rows // bounds.shape[0])
    shape = jax.ShapeDtypeStruct((rows, problem.pieces, WORDS), jnp.int32)
    words = x.reshape(rows, length // BITS, BITS)

    def body(*refs: Any) -> None:
        _body(problem, *refs)

    found = gpu.call(
        body,
        name="largest_bits",
        out_type=shape,
        scratch_types=[
            plgpu.SMEM((problem.held * WORDS, BITS), jnp.int32),
            plgpu.SMEM((problem.pieces, WORDS), jnp.int32),
            plgpu.Barrier(num_barriers=problem.held),
        ],
        grid=(rows,),
        grid_names=("row",),
        cost=cost((words, shape), flops=0),
    )(words, bounds)
    return found.reshape(rows, -1)[:, : length // BITS]


def _body(problem: Problem, x: Any, bounds: Any, out: Any, held: Any, bits: Any, arrived: Any) -> None:
    r, size = lax.axis_index("row"), problem.size
    tile = lax.div(r, jnp.int32(problem.tile))
    first, end = (lax.div(bounds[tile, i] + (size - 1), jnp.int32(size)) for i in range(2))
    row = _Row(problem, held, x.at[r], first, jnp.minimum(first + problem.held, end), end)
    row.fetch(arrived)
    least, begin = row.least()

    def nothing(n: Array, _: None) -> None:
        bits.at[n][...] = gpu.full((WORDS,), 0, jnp.int32)

    def found(n: Array, source: Any, at: Array) -> None:
        bits.at[n][...] = row.bits(n, source.at[pl.ds(at * WORDS, WORDS)], least, begin)

    lax.fori_loop(0, first, nothing, None)
    row.visit(lambda n, source, at, _: found(n, source, at), None)
    lax.fori_loop(end, problem.pieces, nothing, None)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(bits, out.at[r])
    plgpu.wait_smem_to_gmem(0)


def _strided(size: int) -> Any:
    return plgpu.Layout.WG_STRIDED((size // BITS, BITS), vec_size=math.gcd(4, size // 128))


class _Row(NamedTuple):
    """The pieces of a row [S / 32, 32] from the first to before the end, those before `mid` in shared memory."""

    problem: Problem
    held: Any
    source: Any
    first: Array
    mid: Array
    end: Array

    def fetch(self, arrived: Any) -> None:
        """Copies what is held; numbers that fill up a piece are never chosen."""
        rows = self.problem.size // BITS

        def copy(n: Array, _: None) -> None:
            to = self.held.at[pl.ds((n - self.first) * rows, rows)]
            plgpu.copy_gmem_to_smem(self.source.at[pl.ds(n * rows, rows)], to, arrived.at[n - self.first])

        lax.fori_loop(self.first, self.mid, copy, None)
        missing = LEAST_PART // BITS
        for start in range(rows, WORDS, missing):
            fill = jnp.full((missing, BITS), NEVER, jnp.int32)
            self.held.at[pl.ds(start, missing)][...] = plgpu.layout_cast(fill, _strided(LEAST_PART))
        lax.fori_loop(0, self.mid - self.first, lambda n, _: plgpu.barrier_wait(arrived.at[n]), None)

    def visit(self, step: Callable[[Array, Any, Array, Any], Any], state: Any) -> Any:
        """The state after step(n, source, place of the piece there, state) of every piece n."""
        state = lax.fori_loop(self.first, self.mid, lambda n, state: step(n, self.held, n - self.first, state), state)
        if self.problem.held < self.problem.pieces:
            state = lax.fori_loop(self.mid, self.end, lambda n, state: step(n, self.source, n, state), state)
        return state

    def counts(self, tests: Callable[[Array, Array], list[Array]], number: int) -> list[Array]:
        """How many numbers pass each of so many tests of (numbers, their places)."""
        size, parts = self.problem.size, 1 if self.problem.digit == 2 else 2  # so that registers hold all sums
        rows, layout = size // parts // BITS, _strided(size // parts)
        word, bit = (plgpu.broadcasted_iota(jnp.int32, (rows, BITS), axis, layout=layout) for axis in (0, 1))

        def add(n: Array, source: Any, at: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            for part in range(parts):
                some = plgpu.load(source.at[pl.ds((at * parts + part) * rows, rows)], layout=layout)  # type: ignore[call-arg]
                found = tests(some, n * size + (part * rows + word) * BITS + bit)
                totals = tuple(total + x.astype(jnp.int32) for total, x in zip(totals, found, strict=True))
            return totals

        nothing = plgpu.layout_cast(jnp.zeros((rows, BITS), jnp.int32), layout)
        return [jnp.sum(x) for x in self.visit(add, (nothing,) * number)]

    def search(self, bits: int, target: Array, test: Callable[[Array, Array, Array], Array]) -> tuple[Array, Array]:
        """The largest v below 2^bits for which test(numbers, places, v) holds `target` times or more, and how often; 0 and -1 without one.

        Where one holds just as often it may be a smaller one.
        """
        size = self.problem.digit
        digits = range(1, 1 << size)

        def one_digit(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            shift, found, count = state
            tried = [found | (jnp.int32(digit) << shift) for digit in digits]
            totals = self.counts(lambda some, places: [test(some, places, v) for v in tried], len(tried))
            for digit, v, total in zip(digits, tried, totals, strict=True):
                enough = (total >= target) & (shift <= bits - digit.bit_length())  # the first digit may have fewer bits
                found, count = jnp.where(enough, v, found), jnp.where(enough, total, count)
            return shift - size, found, count

        start = jnp.int32((bits - 1) // size * size), jnp.int32(0), jnp.int32(-1)
        _, found, count = lax.while_loop(lambda state: (state[0] >= 0) & (state[2] != target), one_digit, start)
        return found, count

    def least(self) -> tuple[Array, Array]:
        """The least number that is chosen, and the place from which on those that equal it are."""
        some = (self.end - self.first) * self.problem.size > self.problem.top_k
        return lax.cond(some, self._least, lambda: (jnp.int32(NEVER + 1), jnp.int32(0)))

    def _least(self) -> tuple[Array, Array]:
        top_k = jnp.int32(self.problem.top_k)
        bits, count = self.search(32, top_k, lambda some, _, v: some >= (v ^ NEVER))
        least = bits ^ NEVER

        def begin() -> Array:
            [above] = self.counts(lambda some, _: [some > least], 1)
            later = lambda some, places, v: (some == least) & (places >= v)
            return self.search((self.problem.length - 1).bit_length(), top_k - above, later)[0]

        return jnp.maximum(least, NEVER + 1), lax.cond(count > top_k, begin, lambda: jnp.int32(0))

    def bits(self, n: Array, numbers: Any, least: Array, begin: Array) -> Array:
        """int32 [64] of piece n, which is [64, 32]."""
        layout = plgpu.Layout.WGMMA
        some = plgpu.load(numbers, layout=layout, optimized=False)  # type: ignore[call-arg]
        word, bit = (plgpu.broadcasted_iota(jnp.int32, (WORDS, BITS), axis, layout=layout) for axis in (0, 1))
        chosen = (some > least) | ((some == least) & (n * PIECE + word * BITS + bit >= begin))
        one = lax.shift_left(jnp.ones_like(bit), bit)
        return jnp.sum(jnp.where(chosen, one, jnp.zeros_like(one)), axis=1)


def places_of(bits: Array, count: int) -> Array:
    """The places of the first `count` bits that are set, in order, int32 [R, count] of int32 [R, W]; -1 at the end where there are fewer."""
    of_words = lax.population_count(bits)
    ends = jnp.cumsum(of_words, axis=1)
    at_ranks = jnp.zeros((bits.shape[0], count), jnp.int32)
    at_ranks = jax.vmap(lambda at, end: at.at[end].add(1, mode="drop"))(at_ranks, ends)
    word = jnp.cumsum(at_ranks, axis=1)  # as many words end at this rank or before it
    take = lambda x: jnp.take_along_axis(x, word, axis=1, mode="clip")
    some, left = take(bits), lax.broadcasted_iota(jnp.int32, word.shape, 1) - take(ends - of_words)
    place = word * BITS
    for width in (16, 8, 4, 2, 1):
        low = lax.population_count(some & ((1 << width) - 1))
        beyond = left >= low
        left, place = jnp.where(beyond, left - low, left), jnp.where(beyond, place + width, place)
        some = jnp.where(beyond, lax.shift_right_logical(some, width), some)
    return jnp.where(word < bits.shape[1], place, -1)
