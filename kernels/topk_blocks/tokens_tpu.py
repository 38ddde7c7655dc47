"""The choice of tokens by a lightning indexer for TPU, in one kernel: no score leaves the core, and nothing is sorted.

Queries lie along lanes and keys along sublanes. Scores, as whole numbers in the same order, fill the core's memory; the least that is chosen
is found two bits at a time by counting; then each chosen key is as many rows too far down as there are others before it, and moves up by
the bits of that number, the lowest first, so that no two meet.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.costs import cost
from plait.kernels.shapes import matmul_precision
from plait.kernels.target import current
from plait.kernels.topk_blocks.call import TopkCall
from plait.kernels.topk_blocks.tiles import QUERIES, Tiles

Array = jax.Array

PART = 128
"""Keys at a time, and what else is worked on at a time."""

CHUNK = 512
"""Keys in a step of the grid."""

HEADS = 16
"""Heads whose queries are one product."""

RANK_BITS = 12
"""Of a word that holds a chosen token's number and, below it, how many are chosen before it."""

RESERVE = 16 << 20
"""Bytes of a core's memory beside the scores."""

NEVER = -(1 << 31)
"""Below all scores."""


class Problem(NamedTuple):
    """What the kernel is specialised to."""

    top_k: int
    weighed: bool
    num_tiles: int
    """Of queries."""
    num_chunks: int
    shift_bits: int
    """Of how far a key moves."""


def unsupported(call: TopkCall) -> str | None:
    """Why this kernel cannot serve a call that the scores' kernel serves, or None."""
    if not call.tokens_alone:
        return "what is chosen are no tokens by their scores alone"
    here, num_keys = current(), call.blocks.shape[1]
    memory = 0 if here is None else here.vector_memory
    if 4 * QUERIES * (num_keys + CHUNK + PART) > memory * 7 // 8 - RESERVE:
        return f"the scores of {num_keys} tokens exceed a core's memory"
    if call.top_k > 1 << RANK_BITS:
        return f"top_k={call.top_k} exceeds {1 << RANK_BITS}"
    if call.num_blocks > 1 << (31 - RANK_BITS):
        return f"{call.num_blocks} tokens exceed the {1 << (31 - RANK_BITS)} that a word numbers"
    return None


def topk_tokens(call: TopkCall) -> Array:
    """The indices [B, T, Hkv, N], by number; -1 at the end where a query sees fewer."""
    (batch, length, num_heads, width), (count, num_kv_heads) = call.q.shape, call.blocks.shape[1:3]
    tiles, top_k = Tiles.of(call, CHUNK), min(call.top_k, count)
    q, c = tiles.q, tiles.c
    problem = Problem(top_k, bool(tiles.weights), tiles.num_tiles, tiles.num_chunks, (c.shape[2] - 1).bit_length())
    inputs = [
        (q, tiles.queries(q)),
        (c, pl.BlockSpec((1, 1, CHUNK, width), lambda b, g, i, s, reach: (b, g, tiles.chunk_of(b, i, s, reach), 0))),
        (tiles.rows, tiles.queries(tiles.rows)),
        (tiles.tokens, pl.BlockSpec((1, 1, 2, c.shape[2]), lambda b, g, i, s, reach: (b, 0, 0, 0))),
        *((x, tiles.queries(x)) for x in tiles.weights),
    ]
    wide = -(-top_k // PART) * PART
    shape = jax.ShapeDtypeStruct((batch, num_kv_heads, wide, q.shape[2]), jnp.int32)
    scratch = pltpu.VMEM((max(c.shape[2] + PART, wide), QUERIES), jnp.int32)
    found = pl.pallas_call(
        partial(_kernel, problem),
        name="topk_tokens",
        out_shape=shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, num_kv_heads, tiles.num_tiles, tiles.num_chunks),
            in_specs=[spec for _, spec in inputs],
            out_specs=pl.BlockSpec((1, 1, wide, QUERIES), lambda b, g, i, s, reach: (b, g, 0, i)),
            scratch_shapes=[scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",), vmem_limit_bytes=4 * scratch.shape[0] * QUERIES + RESERVE
        ),
        cost_estimate=cost((*(array for array, _ in inputs), shape), flops=width * batch * num_heads * q.shape[2] * c.shape[2]),
    )(tiles.reach, *(array for array, _ in inputs))
    return jnp.moveaxis(found[:, :, :top_k, :length], 3, 1)


def _kernel(problem: Problem, reach: Any, q: Any, c: Any, rows: Any, tokens: Any, *refs: Any) -> None:
    weights, (out, words) = (refs[0] if problem.weighed else None), refs[-2:]
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    chunks = reach[b * problem.num_tiles + i]

    @pl.when(step < chunks)
    def _score():
        for n in range(0, CHUNK, PART):
            first = pl.multiple_of(step * CHUNK + n, PART)
            of_keys = tokens[0, 0, :, pl.ds(first, PART)].T
            visible = (of_keys[:, 0:1] == rows[0, 0, 0:1]) & (of_keys[:, 1:2] <= rows[0, 0, 1:2])
            total = jnp.zeros((PART, QUERIES), jnp.float32)
            for h in range(0, q.shape[1], HEADS):
                some = q[0, h : h + HEADS]
                dims = (((1,), (1,)), ((), ()))
                z = lax.dot_general(
                    c[0, 0, n : n + PART],
                    some.reshape(-1, q.shape[3]),
                    dims,
                    precision=matmul_precision(c.dtype),
                    preferred_element_type=jnp.float32,
                )
                for m in range(some.shape[0]):
                    one = z[:, m * QUERIES : (m + 1) * QUERIES]
                    total += one if weights is None else weights[0, 0, h + m : h + m + 1] * jnp.maximum(one, 0)
            words[pl.ds(first, PART)] = jnp.where(visible, in_order(total), NEVER)

    @pl.when(step == problem.num_chunks - 1)
    def _choose():
        choice = _Choice(problem, words, chunks * (CHUNK // PART))
        choice.mark(*choice.least(), tokens)
        choice.compact()
        for n in range(0, out.shape[2], PART):
            found = words[n : n + PART]
            out[0, 0, n : n + PART] = jnp.where(found >= 0, found >> RANK_BITS, -1)


def in_order(x: Array) -> Array:
    """Whole numbers in the order of float32 numbers, none the least there is; of both zeros the same."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


class _Choice(NamedTuple):
    """The choice among the first parts of the words [S, 128], by column."""

    problem: Problem
    words: Any
    parts: Array

    def at(self, n: Array) -> Any:
        return pl.ds(pl.multiple_of(n * PART, PART), PART)

    def counts(self, least: list[Array]) -> list[Array]:
        """How many words are at least so large, [1, 128] each."""

        def add(n: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            some = self.words[pl.ds(pl.multiple_of(n * CHUNK, CHUNK), CHUNK)]
            found = ((some >= one).astype(jnp.int32) for one in least)
            return tuple(total + jnp.sum(x.reshape(-1, 8, QUERIES), axis=0) for total, x in zip(totals, found, strict=True))

        nothing = tuple(jnp.zeros((8, QUERIES), jnp.int32) for _ in least)
        totals = lax.fori_loop(0, lax.div(self.parts, CHUNK // PART), add, nothing)
        return [jnp.sum(total, axis=0, keepdims=True) for total in totals]

    def least(self) -> tuple[Array, Array, Array]:
        """A word that the top_k are not below and others not above, how many equal it, and how many of these are chosen."""
        top_k = self.problem.top_k

        def two_bits(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            n, found, _ = state
            tried = [found | (digit << (30 - 2 * n)) for digit in (1, 2, 3)]
            counts = self.counts([bits ^ NEVER for bits in tried])
            digit, open_ = jnp.zeros_like(found), jnp.ones_like(found)
            for count in counts:
                digit += (count >= top_k).astype(jnp.int32)
                open_ = jnp.where(count == top_k, 0, open_)
            return n + 1, found | (digit << (30 - 2 * n)), jnp.max(open_)

        start = jnp.int32(0), jnp.zeros((1, QUERIES), jnp.int32), jnp.int32(1)
        _, found, _ = lax.while_loop(lambda state: (state[0] < 16) & (state[2] > 0), two_bits, start)
        least = found ^ NEVER
        above, all_ = self.counts([jnp.maximum(least, least + 1), least])
        return least, all_ - above, jnp.where(least == NEVER, 0, top_k - above)

    def mark(self, least: Array, equal: Array, needed: Array, tokens: Any) -> None:
        """In place of the words of the chosen their numbers and ranks, of others -1; of equal words the later are chosen."""
        row, column = (lax.broadcasted_iota(jnp.int32, (PART, PART), axis) for axis in (0, 1))
        before = (column <= row).astype(jnp.bfloat16)

        def so_far(x: Array) -> Array:
            exact = lax.Precision.DEFAULT  # of whole numbers up to 128
            found = jnp.dot(before, x.astype(jnp.bfloat16), precision=exact, preferred_element_type=jnp.float32)
            return found.astype(jnp.int32)

        def part(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            equals, chosen = carry
            some = self.words[self.at(n)]
            same = some == least
            order = equals + so_far(same)
            picked = (some > least) | (same & (order > equal - needed))
            rank = chosen + so_far(picked)
            number = tokens[0, 0, :, self.at(n)].T[:, 1:2]
            self.words[self.at(n)] = jnp.where(picked, (number << RANK_BITS) | (rank - 1), -1)
            return order[PART - 1 :], rank[PART - 1 :]

        nothing = jnp.zeros((1, QUERIES), jnp.int32)
        lax.fori_loop(0, self.parts, part, (nothing, nothing))

        def clear(n: Array, _: None) -> None:
            self.words[self.at(n)] = jnp.full((PART, QUERIES), -1, jnp.int32)

        lax.fori_loop(self.parts, jnp.maximum(self.parts + 1, -(-self.problem.top_k // PART)), clear, None)

    def compact(self) -> None:
        """Every chosen word to the row of its rank."""
        row = lax.broadcasted_iota(jnp.int32, (PART, QUERIES), 0)

        def goes(x: Array, at: Array, bit: int) -> Array:
            """Whether a word at row `at` has so far to go; a lower bit of its number does not matter to the bits of its rank."""
            rank = x if bit < RANK_BITS else x & ((1 << RANK_BITS) - 1)
            return ((at - rank) & (1 << bit)) != 0

        def move(n: Array, bit: int, *, last: bool) -> None:
            here = self.words[self.at(n)]
            new = jnp.where(goes(here, row + n * PART, bit), -1, here)
            if not last:
                start = n * PART + (1 << bit)
                beyond = self.words[pl.ds(start if bit < PART.bit_length() - 1 else pl.multiple_of(start, PART), PART)]
                new = jnp.where(goes(beyond, row + start, bit) & (beyond >= 0), beyond, new)
            self.words[self.at(n)] = new

        for bit in range(self.problem.shift_bits):
            far = (1 << bit) // PART  # parts, of which the last have nothing beyond

            @pl.when(far < self.parts)
            def _pass(bit: int = bit, far: int = far):
                lax.fori_loop(0, self.parts - far, lambda n, _: move(n, bit, last=False), None)
                lax.fori_loop(self.parts - far, self.parts, lambda n, _: move(n, bit, last=True), None)
