"""The scores of block selection for TPU (Mosaic) where the heads of a group choose together: their sums are made in the kernel.

XLA would write the scores of every head, T H N numbers, and read them again for each step of the softmax; the kernel writes T Hkv N. It goes
through what is scored twice, once for the largest logit and the sum of each row, once for the weights; without a softmax once. Scores
stand transposed, blocks by queries, so that what belongs to a query is a row. What is not past for any query of a tile is not read.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.costs import cost
from plait.kernels.shapes import matmul_precision
from plait.kernels.target import not_on
from plait.kernels.topk_blocks import chunked, reference, tokens_tpu
from plait.kernels.topk_blocks.call import TopkCall
from plait.kernels.topk_blocks.tiles import QUERIES, Tiles, shared_dtype, unfit

Array = jax.Array

CHUNK, PART = 512, 128
"""What is scored in a step of the grid, and at a time."""

HEADS = 16
"""Heads whose queries are one product."""

MAX_QUERY_BYTES = 4 << 20
"""Of the queries of a tile."""

_HIDDEN = -1e30


class Problem(NamedTuple):
    """What the kernel is specialised to."""

    scale: float | None
    weighed: bool
    num_tiles: int
    """Of queries."""
    num_chunks: int


def unsupported(call: TopkCall) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    if reason := not_on("tpu") or unfit(call):
        return reason
    group, width = call.q.shape[2] // call.blocks.shape[2], call.q.shape[3]
    if QUERIES * group * width * shared_dtype(call).itemsize > MAX_QUERY_BYTES:
        return f"{group} heads of {width} channels are more than a tile of queries holds"
    return None


def topk_blocks(call: TopkCall) -> Array:
    """See `plait.kernels.topk_blocks`; the indices."""
    if tokens_tpu.unsupported(call) is None:
        return tokens_tpu.topk_tokens(call)
    return chunked.in_runs(call, call.blocks.shape[2], lambda call: reference.choose(call, scores(call)))


def scores(call: TopkCall) -> Array:
    """As `reference.scores`, [B, T, Hkv, N] float32."""
    (batch, length, num_heads, width), (count, num_kv_heads) = call.q.shape, call.blocks.shape[1:3]
    chunk = min(CHUNK, -(-count // PART) * PART)
    tiles = Tiles.of(call, chunk)
    q, c, num_chunks = tiles.q, tiles.c, tiles.num_chunks
    group = num_heads // num_kv_heads
    problem = Problem(call.scale, bool(tiles.weights), tiles.num_tiles, num_chunks)
    at = lambda b, i, s, reach: tiles.chunk_of(b, i, jax.lax.rem(s, num_chunks), reach)
    inputs = [
        (q, tiles.queries(q)),
        (c, pl.BlockSpec((1, 1, chunk, width), lambda b, g, *rest: (b, g, at(b, *rest), 0))),
        (tiles.rows, tiles.queries(tiles.rows)),
        (tiles.tokens, pl.BlockSpec((1, 1, 2, chunk), lambda b, g, *rest: (b, 0, 0, at(b, *rest)))),
        *((x, tiles.queries(x)) for x in tiles.weights),
    ]
    phases = 1 if call.scale is None else 2
    shape = jax.ShapeDtypeStruct((batch, num_kv_heads, c.shape[2], q.shape[2]), jnp.float32)
    products = phases * batch * num_kv_heads * q.shape[2] * c.shape[2] / 2  # those with blocks that are past
    found = pl.pallas_call(
        partial(_kernel, problem),
        name="group_scores",
        out_shape=shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, num_kv_heads, tiles.num_tiles, phases * num_chunks),
            in_specs=[spec for _, spec in inputs],
            out_specs=pl.BlockSpec(
                (1, 1, chunk, QUERIES), lambda b, g, i, s, reach: (b, g, jnp.maximum(s - (phases - 1) * num_chunks, 0), i)
            ),
            scratch_shapes=[pltpu.VMEM((1, group * QUERIES), jnp.float32)] * 2,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        cost_estimate=cost(
            (*(array for array, _ in inputs), shape),
            flops=2 * width * products,
            transcendentals=0 if call.scale is None else products,
        ),
    )(tiles.reach, *(array for array, _ in inputs))
    return jnp.moveaxis(found[:, :, :count, :length], 3, 1)


def _kernel(problem: Problem, reach: Any, q: Any, c: Any, rows: Any, tokens: Any, *refs: Any) -> None:
    weights, (out, peak, total) = (refs[0] if problem.weighed else None), refs[-3:]
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    first = (step < problem.num_chunks) if problem.scale is not None else None  # of two ways through
    reached = jax.lax.rem(step, problem.num_chunks) < reach[b * problem.num_tiles + i]
    group = q.shape[1]

    def parts() -> Any:
        """Parts of the chunk, and of the heads: where they are, which blocks a query has a score for, and products [part, heads x T]."""
        for n in range(0, c.shape[2], PART):
            at = slice(n, n + PART)
            of_blocks = tokens[0, 0, :, at].T
            visible = (of_blocks[:, 0:1] == rows[0, 0, 0:1]) & (of_blocks[:, 1:2] <= rows[0, 0, 1:2])
            for h in range(0, group, HEADS):
                some = q[0, h : h + HEADS].reshape(-1, q.shape[3])
                dims = (((1,), (1,)), ((), ()))
                z = jax.lax.dot_general(
                    c[0, 0, at], some, dims, precision=matmul_precision(c.dtype), preferred_element_type=jnp.float32
                )
                yield at, h, jnp.concatenate([visible] * (some.shape[0] // QUERIES), axis=1), z

    def summed(at: slice, h: int, x: Array) -> None:
        """Adds the heads of x [part, heads x T], from head h on, to the scores."""
        heads = sum(x[:, n : n + QUERIES] for n in range(0, x.shape[1], QUERIES))
        out[0, 0, at] = heads if h == 0 else out[0, 0, at] + heads

    def largest() -> None:
        for _, h, visible, z in parts():
            columns = slice(h * QUERIES, h * QUERIES + z.shape[1])
            shown, old = jnp.where(visible, problem.scale * z, _HIDDEN), peak[:, columns]
            highest = jnp.maximum(old, jnp.max(shown, axis=0, keepdims=True))
            peak[:, columns] = highest
            grown = jnp.sum(jnp.exp(shown - highest), axis=0, keepdims=True)
            total[:, columns] = jnp.exp(old - highest) * total[:, columns] + grown

    def weighed(h: int, z: Array) -> Array:
        if problem.scale is not None:
            columns = slice(h * QUERIES, h * QUERIES + z.shape[1])
            return jnp.exp(problem.scale * z - peak[:, columns]) / total[:, columns]
        if weights is None:
            return z
        some = weights[0, 0, h : h + HEADS]
        return jnp.maximum(z, 0) * jnp.concatenate([some[n : n + 1] for n in range(some.shape[0])], axis=1)

    def weigh() -> None:
        for at, h, visible, z in parts():
            summed(at, h, jnp.where(visible, weighed(h, z), 0))

    def nothing() -> None:
        out[...] = jnp.zeros_like(out)

    if first is None:
        pl.when(reached)(weigh)
        pl.when(jnp.logical_not(reached))(nothing)
        return

    @pl.when(step == 0)
    def _start():
        peak[...] = jnp.full_like(peak, _HIDDEN / 2)  # of a row with no score all weights are then 0
        total[...] = jnp.zeros_like(total)

    pl.when(first & reached)(largest)
    pl.when(jnp.logical_not(first) & reached)(weigh)
    pl.when(jnp.logical_not(first | reached))(nothing)
