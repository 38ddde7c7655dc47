"""The mean over heads of attention's weights on the tokens that each query has chosen, for TPU: what an indexer's scores are compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from plait.kernels.attention.reference import MASKED as HIDDEN
from plait.kernels.attention.tpu.tokens import kernels
from plait.kernels.attention.tpu.tokens.chunks import Chunks, call_kernel, own_column
from plait.kernels.attention.tpu.tokens.tables import QUERIES, Part, Problem, Tables, cut_tables, listed, repelled, whole
from plait.kernels.attention.tpu.weights import LOG2_E, NT, dot

Array = jax.Array

UNSEEN = -1.0
"""In place of the weight on a token that nobody sees."""

_LEAST = -1e29
"""Above the logit of such a one, below all others."""


def mean_weights(tables: Tables, q: Array, k: Array, rows: Array, hidden: Array, lse: Array | None = None) -> Array:
    """[B, T, N] float32, `UNSEEN` where there is no token or one that is hidden.

    One pass over the tokens where each head's log-sum-exp is known; else one more before it, since tables of several parts share a sum.

    Args:
      tables: of the keys, without values.
      q: [B, T, H, K]; H is a multiple of 8.
      k: [B, S, K].
      rows: [B, T, N] of k; -1 is none. No query has one twice.
      hidden: bool [B, S].
      lse: [B, T, H] float32, natural, over the tokens of all tables; None where it is not known.
    """
    (length, chosen), (problem, parts) = rows.shape[1:], tables.cut(gradients=False)
    wide, cut = repelled(problem, whole(q)), cut_tables(problem, parts, rows, k, hidden, aligned=True)

    def normalizers(part: Part) -> Array:
        return kernels.forward(problem, wide, part.far, *listed(problem, rows, part, aligned=True))[0][:, :, 0]

    def of_tables(function: Callable[[Part], Array]) -> Array:
        return function(jax.tree.map(lambda x: x[0], cut))[None] if parts == 1 else jax.lax.map(function, cut)

    lse = jax.nn.logsumexp(of_tables(normalizers), axis=0) if lse is None else whole(lse)
    bits = LOG2_E * jnp.where(lse > HIDDEN / 2, lse, 0)
    found = of_tables(lambda part: weights(problem, wide, bits, part.far, *listed(problem, rows, part, aligned=True))).max(0)
    return found[:, :length, :chosen]


def weights(problem: Problem, q: Array, lse: Array, far: Array, entries: Array, bounds: Array) -> Array:
    """Of the tokens of a table, [B, T, L].

    Args:
      q: [B, T, H, width], of `repelled`; T is a multiple of 8.
      lse: [B, T, H] float32, to the base of 2; of all tables.
      far: the `table`.
      entries, bounds: of `listed`.
    """
    (found,) = call_kernel(
        partial(_kernel, problem),
        "mean_weights",
        (q, lse),
        far,
        (entries, bounds),
        outputs=[jax.ShapeDtypeStruct((*lse.shape[:2], entries.shape[3] // QUERIES), jnp.float32)],
        scratch=[],
        columns=q.shape[3],
        problem=problem,
    )
    return found


def _kernel(problem: Problem, bounds: Any, entries: Any, far: Any, q: Any, lse: Any, found: Any, *scratch: Any) -> None:
    chunks = Chunks.begin(problem, bounds, entries, far, scratch)
    found[...] = jnp.full_like(found, UNSEEN)
    columns, heads = lse[0].T, q.shape[2]  # [H, 8]

    def visit(i: Array, c: Array, k: Array) -> None:
        z = dot(q[0, i], k, NT)  # [H, C]
        p = jnp.exp2((problem.scale * LOG2_E) * z - own_column(columns, i))
        mean = jnp.sum(p, axis=0, keepdims=True) / heads
        found[0, pl.ds(i, 1), chunks.lanes(c)] = jnp.where(z[:1] > _LEAST, mean, UNSEEN)

    chunks.each(visit)
