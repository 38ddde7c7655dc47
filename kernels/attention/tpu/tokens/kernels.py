"""The kernels of attention of all heads to tokens that each query chooses one by one, for TPU: forward and gradients.

The heads of a query are the rows of the products. Gradients of the rows are float32 sums in the core's memory, to which a chunk's are added
row by row; that is why no query may choose a token twice.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.attention.reference import MASKED as HIDDEN
from plait.kernels.attention.tpu.tokens.chunks import Chunks, Sums, call_kernel, sums_scratch, sums_shape
from plait.kernels.attention.tpu.tokens.tables import LANES, Problem
from plait.kernels.attention.tpu.weights import LOG2_E, NN, NT, dot

Array = jax.Array

_LOWEST = -1e20
"""The largest q . k before a row is seen."""


def _forward_kernel(problem: Problem, bounds: Any, entries: Any, far: Any, q: Any, *refs: Any) -> None:
    mixed = problem.value_dim > 0
    found, *o, lists, table, buffer, here, moved, peak, total, spread, acc = refs if mixed else (*refs, None)
    chunks = Chunks.begin(problem, bounds, entries, far, (lists, table, buffer, here, moved))
    bits = problem.scale * LOG2_E
    if mixed:

        @pl.when(pl.program_id(1) == 0)
        def _begin():
            acc[...] = jnp.zeros_like(acc)

    def visit(i: Array, c: Array, k: Array) -> None:
        first = c == chunks.low(i)
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
        if mixed:
            acc[...] = keep * acc[...] + dot(p.astype(k.dtype), k[:, : problem.value_dim], NN)

    def finish(i: Array) -> None:
        mass = total[:, :1]
        some = mass > 0
        mass = jnp.where(some, mass, 1)
        if mixed:
            o[0][0, i] = (acc[...] / mass).astype(o[0].dtype)
        log_mass, top = jnp.log(mass), problem.scale * peak[:, :1]
        columns = [jnp.where(some, log_mass + top, HIDDEN)]
        if problem.stats:
            columns += [jnp.where(some, top, HIDDEN), jnp.where(some, log_mass - spread[:, :1] / (LOG2_E * mass), 0)]
        lane = lax.broadcasted_iota(jnp.int32, total.shape, 1)
        tile = jnp.zeros_like(lane, jnp.float32)
        for n, column in enumerate(columns):
            tile = jnp.where(lane == n, column, tile)
        found[0, i] = tile.T[: found.shape[2]]

    def nothing() -> None:
        for output in o:
            output[...] = jnp.zeros_like(output)
        for n, value in enumerate((HIDDEN, HIDDEN, 0)[: found.shape[2]]):
            found[0, :, n] = jnp.full(found.shape[1::2], value, jnp.float32)

    chunks.each(visit, finish, nothing)


def _gradients_kernel(problem: Problem, bounds: Any, entries: Any, far: Any, *refs: Any) -> None:
    q, d_o, rows, *before, d_q, d_table, lists, table, buffer, here, moved, added, acc = refs
    chunks = Chunks.begin(problem, bounds, entries, far, (lists, table, buffer, here, moved))
    of_rows = Sums(chunks, added)
    of_rows.begin()

    def visit(i: Array, c: Array, k: Array) -> None:
        first, of_query = c == chunks.low(i), q[0, i]
        z = dot(k, of_query, NT)  # [C, H]
        row, of_o = rows[0, i], d_o[0, i]
        exponents = (problem.scale * LOG2_E) * z - row[0:1]
        weights = jnp.exp2(exponents)
        d_weights = dot(k[:, : problem.value_dim], of_o, NT) + row[1:2]
        if problem.stats:
            d_weights -= row[2:3] * jnp.where(weights > 0, exponents, 0)
        d_logits = d_weights * weights
        if problem.stats:
            d_logits += jnp.where(z >= row[4:5], row[3:4], 0)
        d_logits = (problem.scale * d_logits).astype(k.dtype)
        for n, tile in enumerate(_of_keys(problem, d_logits, weights.astype(of_o.dtype), of_query, of_o)):
            of_rows.put(n, tile)
        acc[...] = jnp.where(first, 0, acc[...]) + dot(d_logits.T, k, NN)  # [H, W]

    def finish(i: Array) -> None:
        d_q[0, i] = sum((x[0, i] for x in before), acc[...]).astype(d_q.dtype)

    def nothing() -> None:
        d_q[...] = before[0][...] if before else jnp.zeros_like(d_q)

    chunks.each(visit, finish, nothing, of_rows)
    of_rows.end(d_table)


def _of_keys(problem: Problem, d_logits: Array, weights: Array, q: Array, d_o: Array) -> list[Array]:
    """The gradients [C, 128] of a chunk's rows as keys and as values, from those of the logits and the weights [C, H]."""
    d_o = jnp.pad(d_o, ((0, 0), (0, -d_o.shape[1] % LANES)))
    values = d_o.shape[1]
    of_tiles = lambda x: [x[:, n : n + LANES] for n in range(0, x.shape[1], LANES)]
    if problem.deep:
        sides = jnp.concatenate([q[:, :values], d_o], axis=0)
        found = of_tiles(dot(jnp.concatenate([d_logits, weights], axis=1), sides, NN))
        return found + (of_tiles(dot(d_logits, q[:, values:], NN)) if values < problem.width else [])
    as_keys, as_values = of_tiles(dot(d_logits, q, NN)), of_tiles(dot(weights, d_o, NN))
    return [a + b for a, b in zip(as_keys, as_values)] + as_keys[len(as_values) :]


def forward(problem: Problem, q: Array, far: Array, entries: Array, bounds: Array, dtype: Any = jnp.float32) -> tuple[Array, ...]:
    """Float32 rows [B, T, 1 or 3, H], lse and, with statistics, maximum and entropy; and, where there are values, o [B, T, H, V] of a dtype.

    Args:
      q: [B, T, H, width], of `repelled`; T is a multiple of 8.
      far: the `table`.
      entries, bounds: of `listed`.
    """
    batch, length, heads, width = q.shape
    found = 3 if problem.stats else 1
    outputs, state = [jax.ShapeDtypeStruct((batch, length, found, heads), jnp.float32)], [(heads, LANES)] * 3
    if problem.value_dim:
        outputs.append(jax.ShapeDtypeStruct((batch, length, heads, problem.value_dim), dtype))
        state.append((heads, problem.value_dim))
    return call_kernel(
        partial(_forward_kernel, problem),
        "chosen_tokens_forward",
        (q,),
        far,
        (entries, bounds),
        outputs=outputs,
        scratch=[pltpu.VMEM(shape, jnp.float32) for shape in state],
        columns=width + problem.value_dim,
        problem=problem,
    )


def gradients(
    problem: Problem, q: Array, d_o: Array, rows: Array, far: Array, entries: Array, bounds: Array, before: Array | None = None
) -> tuple[Array, Array]:
    """Those of q, [B, T, H, width], and the table with its rows' in the sums, from d_o [B, T, H, V].

    The float32 rows [B, T, R, H] are those of `weights.stacked_rows`; other arguments as in `forward`. To `before`, float32, those of q are
    added in place.
    """
    further = [] if before is None else [before]
    return call_kernel(
        partial(_gradients_kernel, problem),
        "chosen_tokens_gradients",
        (q, d_o, rows, *further),
        far,
        (entries, bounds),
        outputs=[jax.ShapeDtypeStruct(q.shape, q.dtype if before is None else before.dtype), sums_shape(problem, q.shape[0])],
        scratch=[*sums_scratch(problem), pltpu.VMEM(q.shape[2:], jnp.float32)],
        columns=3 * q.shape[3] + 2 * problem.value_dim,
        problem=problem,
        in_place=before is not None,
    )
