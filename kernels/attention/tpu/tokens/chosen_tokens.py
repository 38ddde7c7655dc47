"""Attention of all heads to tokens that each query chooses one by one, for TPU, where the values are the first channels of the keys.

Tokens beyond what a core's memory holds are tables of their own, the results of which are joined.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.attention.call import AttentionCall
from plait.kernels.attention.chosen_rows import chosen_rows
from plait.kernels.attention.per_query import gradient_rows
from plait.kernels.attention.reference import MASKED as HIDDEN
from plait.kernels.attention.ties import longest_keys, ties
from plait.kernels.attention.tpu.tokens import kernels
from plait.kernels.attention.tpu.tokens.tables import (
    CHUNK,
    LEAST,
    MIN_MEMORY,
    Part,
    Problem,
    Tables,
    batch,
    cut_tables,
    deep,
    listed,
    repelled,
    sums_of,
    whole,
)
from plait.kernels.attention.tpu.weights import stacked_rows
from plait.kernels.attention.visits import laid_out
from plait.kernels.target import core_memory

Array = jax.Array

MAX_DIM = 1024
"""Channels of a key."""

MAX_CHOSEN = 4096
"""Tokens that a query chooses: lists of eight queries, two at a time, in the core's 1 MiB of scalar memory."""


def unsupported(call: AttentionCall) -> str | None:
    """Why this kernel cannot serve a call that selects tokens, beyond what those of blocks cannot either; or None."""
    heads, chosen = call.q.shape[2], call.selected.indices.shape[3]
    if (memory := core_memory()) < MIN_MEMORY:
        return f"tokens are selected one by one, and a core's memory of {memory >> 20} MiB holds too few"
    if not call.values_in_keys:
        return "tokens are selected one by one, and the values are no channels of the keys; give value_dim"
    if call.k.shape[2] > 1:
        return f"tokens are selected one by one, of {call.k.shape[2]} key heads, not of one"
    if heads % 8:
        return f"{heads} heads are no multiple of 8"
    if call.k.shape[3] > MAX_DIM:
        return f"head dim {call.k.shape[3]} exceeds {MAX_DIM}"
    if chosen > MAX_CHOSEN:
        return f"{chosen} tokens a query exceed the {MAX_CHOSEN} that scalar memory holds"
    if call.sigmoid or call.logit_soft_cap is not None:
        return "tokens are selected one by one, under a softmax without a soft cap only"
    if tables_of(call).room(gradients=True) < LEAST:
        return (
            f"{heads} heads of {call.k.shape[3]} channels leave a core's memory of {memory >> 20} MiB no room for a table of keys"
        )
    return None


def tables_of(call: AttentionCall) -> Tables:
    """The tables of a call's keys."""
    problem = Problem(
        scale=call.scale,
        stats=call.return_stats,
        heads=call.q.shape[2],
        key_dim=call.k.shape[3],
        value_dim=call.v.shape[3],
        dtype=call.k.dtype.name,
        chunk=min(CHUNK, -(-call.selected.indices.shape[3] // 16) * 16),
        rows=0,
        sums=False,
        deep=deep(call.q.shape[2]),
        batch=batch(),
    )
    return Tables(problem, call.k.shape[1], call.selected.indices.shape[3], core_memory())


def attention(call: AttentionCall) -> tuple[Array, list[Array]]:
    """o [B, T, H, V] and rows [B, T, H]: lse and, with statistics, maximum and entropy."""
    rows, tables = chosen_rows(call, padding=not call.mask.causal)[:, :, 0], tables_of(call)
    if tables.cut(gradients=True)[1] > 1:
        rows = jnp.sort(rows, axis=2)  # so that those of a table are neighbours
    layout, queries, keys = laid_out(call)
    hidden = jnp.broadcast_to(keys.segment_ids == 0, call.k.shape[:2])
    longest = longest_keys(layout, queries, keys, call.k) if call.return_stats else None
    o, found = _attend(tables, call.q, call.k[:, :, 0], rows, hidden, longest)
    return o, list(found)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    tables: Tables, q: Array, k: Array, rows: Array, hidden: Array, longest: Array | None
) -> tuple[Array, tuple[Array, ...]]:
    return _forward(tables, q, k, rows, hidden, longest)[0]


def _forward(tables: Tables, q: Array, k: Array, rows: Array, hidden: Array, longest: Array | None) -> Any:
    length, (problem, parts) = q.shape[1], tables.cut(gradients=False)
    wide = repelled(problem, whole(q))
    dtype = q.dtype if parts == 1 else jnp.float32

    def of_part(part: Part) -> tuple[Array, Array]:
        stacked, o = kernels.forward(problem, wide, part.far, *listed(problem, rows, part), dtype)
        return o, stacked

    o, stacked = _joined(of_part, cut_tables(problem, parts, rows, k, hidden))
    o, found = o[:, :length].astype(q.dtype), tuple(jnp.moveaxis(stacked[:, :length], 2, 0))
    return (o, found), (q, k, rows, hidden, longest, o, found)


def _joined(of_part: Callable[[Part], tuple[Array, Array]], parts: Part) -> tuple[Array, Array]:
    """Outputs and rows over all keys, of those over the keys of each part."""
    first, others = jax.tree.map(lambda x: x[0], parts), jax.tree.map(lambda x: x[1:], parts)
    found = of_part(first)
    if not len(others.low):
        return found
    return jax.lax.scan(lambda found, part: (_both(found, of_part(part)), None), found, others)[0]


def _both(*parts: tuple[Array, Array]) -> tuple[Array, Array]:
    lse = jnp.stack([found[:, :, 0] for _, found in parts])
    some = lse > HIDDEN / 2
    total = jnp.where(some.any(0), jax.nn.logsumexp(lse, axis=0), HIDDEN)
    log_share = jnp.where(some, lse - total[None], 0)
    share = jnp.where(some, jnp.exp(log_share), 0)
    o = share[0][..., None] * parts[0][0] + share[1][..., None] * parts[1][0]
    rows = [total]
    if parts[0][1].shape[2] > 1:
        peak, entropy = (jnp.stack([found[:, :, n] for _, found in parts]) for n in (1, 2))
        rows += [peak.max(0), (share * (entropy - log_share)).sum(0)]
    return o, jnp.stack(rows, axis=2)


def _backward(tables: Tables, saved: Any, cotangents: tuple[Array, tuple[Array, ...]]) -> Any:
    q, k, rows, hidden, longest, o, found = saved
    d_o, d_found = cotangents
    (length, key_dim), (problem, parts) = q.shape[1::2], tables.cut(gradients=True)
    delta = jnp.sum(d_o.astype(jnp.float32) * o, axis=3)
    lse, *others = gradient_rows(found, d_found, delta, near=lambda: ties(problem.scale, q, longest))
    stacked = stacked_rows(problem.scale, [jnp.where(lse > HIDDEN / 2, lse, 0), *others])  # [B, T, R, H]
    wide, d_o, stacked = repelled(problem, whole(q)), whole(d_o.astype(q.dtype)), whole(stacked)

    def of_part(before: Array | None, part: Part) -> tuple[Array, Array]:
        return kernels.gradients(problem, wide, d_o, stacked, part.far, *listed(problem, rows, part), before)

    cut = cut_tables(problem, parts, rows, k, hidden)
    if parts == 1:
        d_q, found = of_part(None, jax.tree.map(lambda x: x[0], cut))
        found = found[None]
    else:
        d_q, found = jax.lax.scan(of_part, jnp.zeros(wide.shape, jnp.float32), cut)
    d_k = sums_of(problem, found)[:, : k.shape[1], :key_dim]
    return d_q[:, :length, :, :key_dim].astype(q.dtype), d_k.astype(k.dtype), None, None, None


_attend.defvjp(_forward, _backward)
