"""The divergence over tokens that queries choose one by one, for TPU: kernels bring the chosen keys together, of attention and of the indexer.

What exists of a query are numbers of its chosen tokens alone: the mean of attention's weights, the scores, and the divergence's gradient
by the scores, which is kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.attention import pallas_tpu as attention
from plait.kernels.attention.call import AttentionCall
from plait.kernels.attention.chosen_rows import chosen_rows
from plait.kernels.attention.tpu.tokens.tables import CHUNK, LANES, LEAST, Problem, Tables, batch
from plait.kernels.index_divergence.call import DivergenceCall
from plait.kernels.index_divergence.tpu.chosen_scores import chosen_scores, score_gradients
from plait.kernels.index_divergence.tpu.mean_weights import mean_weights
from plait.kernels.target import core_memory, not_on

Array = jax.Array


def unsupported(call: DivergenceCall) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    if reason := not_on("tpu"):
        return reason
    if call.selected is None or call.selected.block_size > 1:
        return "no tokens are selected one by one"
    heads = call.index_q.shape[2]
    if heads % 8:
        return f"{heads} heads of the indexer are no multiple of 8"
    if call.index_q.dtype.name not in ("float32", "bfloat16"):
        return f"index_q is {call.index_q.dtype}, not float32 or bfloat16"
    if reason := attention.unsupported(_attention(call)):
        return reason
    if _tables(call)[1].room(gradients=True) < LEAST:
        return f"{heads} heads of the indexer leave a core's memory of {core_memory() >> 20} MiB no room for a table of its keys"
    return None


def index_divergence(call: DivergenceCall) -> Array:
    """See `plait.kernels.index_divergence`."""
    rows = chosen_rows(_attention(call), padding=not call.mask.causal)[:, :, 0]
    of_keys, of_index = _tables(call)
    if max(tables.cut(gradients=True)[1] for tables in (of_keys, of_index)) > 1:
        rows = jnp.sort(rows, axis=2)  # so that those of a table are neighbours
    hidden = jnp.broadcast_to(call.kv_at.segment_ids == 0, call.k.shape[:2])
    target = mean_weights(of_keys, call.q, call.k[:, :, 0], rows, hidden, call.lse)
    return _divergence(of_index, call.index_q, call.index_k, call.weights, rows, target)


def _tables(call: DivergenceCall) -> tuple[Tables, Tables]:
    """Of the keys, and of the indexer's."""
    chosen = call.selected.indices.shape[3]
    problem = Problem(
        scale=call.scale,
        stats=False,
        heads=call.q.shape[2],
        key_dim=call.k.shape[3],
        value_dim=0,
        dtype=call.q.dtype.name,
        chunk=min(CHUNK, -(-chosen // LANES) * LANES),
        rows=0,
        sums=False,
        batch=batch(),
    )
    of_keys = Tables(problem, call.k.shape[1], chosen, core_memory(), step=LANES)
    (_, _, heads, key_dim), dtype = call.index_q.shape, call.index_q.dtype.name
    of_index = replace(problem, heads=heads, key_dim=key_dim, dtype=dtype, hiding=False)
    return of_keys, replace(of_keys, problem=of_index)


def _attention(call: DivergenceCall) -> AttentionCall:
    """The attention whose weights are the target."""
    return AttentionCall(
        q=call.q,
        k=call.k,
        v=call.k,
        at=call.at,
        kv_at=call.kv_at,
        selected=call.selected,
        mask=call.mask,
        scale=call.scale,
        kv_in_order=True,
        values_in_keys=True,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(tables: Tables, index_q: Array, index_k: Array, weights: Array, rows: Array, target: Array) -> Array:
    return _forward(tables, index_q, index_k, weights, rows, target)[0]


def _forward(tables: Tables, index_q: Array, index_k: Array, weights: Array, rows: Array, target: Array) -> Any:
    """The divergence and, of each chosen token, its gradient by the score."""
    scores = chosen_scores(tables, index_q, index_k, weights, rows)
    seen, some = target >= 0, target > 0
    share = jax.nn.log_softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    share, target = jnp.where(seen, share, 0), jnp.where(seen, target, 0)
    divergence = jnp.sum(target * (jnp.log(jnp.where(some, target, 1)) - share), axis=-1)
    d_scores = jnp.where(seen, target.sum(-1, keepdims=True) * jnp.exp(share) - target, 0)
    return divergence, (index_q, index_k, weights, rows, d_scores)


def _backward(tables: Tables, saved: Any, d_divergence: Array) -> Any:
    index_q, index_k, weights, rows, d_scores = saved
    d_scores = d_divergence[..., None] * d_scores
    return *score_gradients(tables, index_q, index_k, weights, rows, d_scores), None, None


_divergence.defvjp(_forward, _backward)
