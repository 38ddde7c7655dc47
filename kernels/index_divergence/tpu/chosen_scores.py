"""The scores of an indexer for the tokens that each query has chosen, and their gradients, for TPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.attention.tpu.tokens.chunks import (
    Chunks,
    Sums,
    call_kernel,
    own_column,
    sums_scratch,
    sums_shape,
)
from plait.kernels.attention.tpu.tokens.tables import LANES, QUERIES, Part, Problem, Tables, cut_tables, listed, sums_of, whole
from plait.kernels.attention.tpu.weights import NN, NT, dot

Array = jax.Array


def chosen_scores(tables: Tables, index_q: Array, index_k: Array, weights: Array, rows: Array) -> Array:
    """`sum_h weights_ih relu(index_q_ih . index_k_s)`, [B, T, N] float32; 0 where there is no token.

    Args:
      tables: of index_k, where nothing is hidden.
      index_q: [B, T, I, C]; I is a multiple of 8.
      index_k: [B, S, C].
      weights: [B, T, I].
      rows: [B, T, N] of index_k; -1 is none. No query has one twice.
    """
    (length, chosen), (problem, parts) = rows.shape[1:], tables.cut(gradients=False)
    queries = _wide(problem, index_q), whole(weights.astype(jnp.float32))

    def of_part(part: Part) -> Array:
        return forward(problem, *queries, part.far, *listed(problem, rows, part, aligned=True))

    return jax.lax.map(of_part, _cut(problem, parts, rows, index_q, index_k)).sum(0)[:, :length, :chosen]


def score_gradients(
    tables: Tables, index_q: Array, index_k: Array, weights: Array, rows: Array, d_scores: Array
) -> tuple[Array, Array, Array]:
    """Those of index_q, index_k and weights, from those of the scores, [B, T, N] float32; other arguments as in `chosen_scores`."""
    (length, chosen), (problem, parts) = rows.shape[1:], tables.cut(gradients=True)
    d_scores = jnp.pad(whole(d_scores), ((0, 0), (0, 0), (0, -chosen % problem.chunk)))
    queries = _wide(problem, index_q), whole(weights.astype(jnp.float32))

    def of_part(part: Part) -> tuple[Array, Array, Array]:
        return gradients(problem, *queries, d_scores, part.far, *listed(problem, rows, part, aligned=True))

    d_q, d_weights, found = jax.lax.map(of_part, _cut(problem, parts, rows, index_q, index_k))
    d_k = sums_of(problem, found)[:, : index_k.shape[1], : index_k.shape[2]]
    d_q = d_q.sum(0)[:, :length, :, : index_q.shape[3]]
    return d_q.astype(index_q.dtype), d_k.astype(index_k.dtype), d_weights.sum(0)[:, :length].astype(weights.dtype)


def _wide(problem: Problem, index_q: Array) -> Array:
    return jnp.pad(whole(index_q), ((0, 0),) * 3 + ((0, problem.width - index_q.shape[3]),))


def _cut(problem: Problem, parts: int, rows: Array, index_q: Array, index_k: Array) -> Part:
    seen = jnp.zeros(index_k.shape[:2], bool)
    return cut_tables(problem, parts, rows, index_k.astype(index_q.dtype), seen, aligned=True)


def forward(problem: Problem, q: Array, weights: Array, far: Array, entries: Array, bounds: Array) -> Array:
    """The scores of the tokens of a table, [B, T, L].

    Args:
      q: [B, T, I, width]; T is a multiple of 8.
      weights: [B, T, I] float32.
      far: the `table`.
      entries, bounds: of `listed`.
    """
    (found,) = call_kernel(
        partial(_forward_kernel, problem),
        "index_scores",
        (q, weights),
        far,
        (entries, bounds),
        outputs=[jax.ShapeDtypeStruct((*weights.shape[:2], entries.shape[3] // QUERIES), jnp.float32)],
        scratch=[],
        columns=q.shape[3],
        problem=problem,
    )
    return found


def gradients(
    problem: Problem, q: Array, weights: Array, d_scores: Array, far: Array, entries: Array, bounds: Array
) -> tuple[Array, Array, Array]:
    """Those of q and weights, float32, and the table with its rows' in the sums, from d_scores [B, T, L]; others as in `forward`."""
    (batch, _, heads, width) = q.shape
    return call_kernel(
        partial(_gradients_kernel, problem),
        "index_scores_gradients",
        (q, weights, d_scores),
        far,
        (entries, bounds),
        outputs=[*(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, weights)), sums_shape(problem, batch)],
        scratch=[
            *sums_scratch(problem),
            *[pltpu.VMEM((heads, n), jnp.float32) for n in (width, QUERIES)],
        ],
        columns=3 * width,
        problem=problem,
    )


def _forward_kernel(
    problem: Problem, bounds: Any, entries: Any, far: Any, q: Any, weights: Any, found: Any, *scratch: Any
) -> None:
    chunks = Chunks.begin(problem, bounds, entries, far, scratch)
    found[...] = jnp.zeros_like(found)
    columns = weights[0].T  # [I, 8]

    def visit(i: Array, c: Array, k: Array) -> None:
        z = dot(q[0, i], k, NT)  # [I, C]
        weighed = own_column(columns, i) * jnp.maximum(z, 0)
        found[0, pl.ds(i, 1), chunks.lanes(c)] = jnp.sum(weighed, axis=0, keepdims=True)

    chunks.each(visit)


def _gradients_kernel(problem: Problem, bounds: Any, entries: Any, far: Any, *refs: Any) -> None:
    q, weights, d_scores, d_q, d_weights, d_table, *rows, added, acc, of_weights = refs
    chunks = Chunks.begin(problem, bounds, entries, far, rows)
    of_rows = Sums(chunks, added)
    of_rows.begin()
    of_weights[...] = jnp.zeros_like(of_weights)
    columns = weights[0].T  # [I, 8]

    def visit(i: Array, c: Array, k: Array) -> None:
        of_query = q[0, i]
        z, d = dot(of_query, k, NT), d_scores[0, pl.ds(i, 1), chunks.lanes(c)]  # [I, C], [1, C]
        own = jnp.sum(d * jnp.maximum(z, 0), axis=1, keepdims=True)
        of_weights[...] += jnp.where(lax.broadcasted_iota(jnp.int32, columns.shape, 1) == i, own, 0)
        d_z = jnp.where(z > 0, own_column(columns, i) * d, 0).astype(k.dtype)
        acc[...] = jnp.where(c == chunks.low(i), 0, acc[...]) + dot(d_z, k, NN)
        d_k = dot(d_z.T, of_query, NN)
        for n in range(problem.tiles):
            of_rows.put(n, d_k[:, n * LANES : (n + 1) * LANES])

    def finish(i: Array) -> None:
        d_q[0, i] = acc[...]

    def nothing() -> None:
        d_q[...] = jnp.zeros_like(d_q)

    chunks.each(visit, finish, nothing, of_rows)
    d_weights[0] = of_weights[...].T
    of_rows.end(d_table)
