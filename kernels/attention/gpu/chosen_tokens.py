"""Attention to tokens that queries choose one by one, by the kernels that gather them: what surrounds `chosen_kernels`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels import gpu
from plait.kernels.attention.call import AttentionCall
from plait.kernels.attention.chosen_rows import chosen_rows
from plait.kernels.attention.gpu import chosen_gradients, chosen_kernels
from plait.kernels.attention.gpu.chosen_kernels import TILE, Operands, Problem
from plait.kernels.attention.gpu.kernels import LN2, LOG2E, ROWS
from plait.kernels.attention.per_query import first_mass, gradient_rows, with_sinks
from plait.kernels.attention.reference import AttentionStats, lse_alone
from plait.kernels.attention.ties import longest_keys, ties
from plait.kernels.attention.visits import laid_out

Array = jax.Array

CHANNELS = 64
"""Channels are padded to multiples."""

LEAST_PAIRS = 8
"""All pairs of a group's heads and the keys over the chosen tokens, at least. A gathered token takes the place of 64 pairs, however few heads
share it, and the chunked form computes all pairs, in 5/8 of the square, with logits that go through memory: an estimate, not measured."""


def unsupported(call: AttentionCall) -> str | None:
    """Why the kernel cannot serve a call that selects tokens, apart from what dtypes and biases every GPU kernel lacks, or None."""
    choosing, heads = call.selected.indices.shape[2], call.k.shape[2]
    if choosing != heads:
        return f"{choosing} heads choose tokens of {heads} key heads, and the heads of a key head are to share its choice"
    group, num_keys, chosen = call.q.shape[2] // heads, call.k.shape[1], call.selected.indices.shape[3]
    if group * num_keys < LEAST_PAIRS * chosen:
        return (
            f"{group} heads that share {chosen} chosen tokens of {num_keys} are too few for the products that gathered rows fill"
        )
    if call.sigmoid:
        return "chosen tokens are gathered for the softmax only"
    if call.logit_soft_cap is not None:
        return "chosen tokens are gathered without a soft cap"
    if call.values_in_keys and call.v.shape[3] % CHANNELS:
        return f"the values are the first {call.v.shape[3]} channels of the keys, no multiple of {CHANNELS}"
    problem = _problem(call)
    if problem.value_dim > problem.key_dim:
        return f"values of {call.v.shape[3]} channels are wider than keys of {call.k.shape[3]}"
    needed = problem.shared_memory(own_values=not call.values_in_keys)
    if needed > gpu.MAX_SMEM:
        return f"head dims {call.k.shape[3]} and {call.v.shape[3]} need {needed} bytes of shared memory of {gpu.MAX_SMEM}"
    return None


def attention(call: AttentionCall) -> tuple[Array, AttentionStats | None]:
    """See `plait.kernels.attention`; always a pair here."""
    problem = _problem(call)
    batch, length, num_heads = call.q.shape[:3]
    num_keys, groups = call.k.shape[1:3]
    group = num_heads // groups
    layout, queries, keys = laid_out(call)
    rows = chosen_rows(call)
    first = jnp.arange(batch, dtype=jnp.int32)[:, None, None, None] * num_keys
    flat = (first + rows) * groups + jnp.arange(groups, dtype=jnp.int32)[None, None, :, None]
    rows = jnp.where(rows >= 0, flat, -1).reshape(-1, rows.shape[3])
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % TILE)), constant_values=-1)
    size = -(-group // 8) * 8 if group <= ROWS else ROWS
    q = _pad(call.q.reshape(-1, group, call.q.shape[3]), (0, -group % size, problem.key_dim - call.q.shape[3]))
    wide = lambda x, width: _pad(x.reshape(-1, x.shape[3]), (0, width - x.shape[3]))
    k = wide(call.k, problem.key_dim)
    v = None if call.values_in_keys else wide(call.v, problem.value_dim)
    by_head = lambda x: x.reshape(-1, problem.blocks * size, *x.shape[2:])[:, :group].reshape(
        batch, length, num_heads, *x.shape[2:]
    )
    longest = None
    if call.return_stats:
        longest = jnp.repeat(longest_keys(layout, queries, keys, call.k).reshape(-1, 1), problem.blocks, axis=0)
    o, found = _gathered(problem, q.reshape(-1, size, q.shape[2]), k, v, rows, longest)
    o, stats = by_head(o)[..., : call.v.shape[3]], [by_head(x) for x in found]
    if call.return_stats:
        stats.append(first_mass(call, stats[0], queries, keys))
    if call.sink_logits is not None:
        o, stats = with_sinks(o, stats, call.sink_logits)
    if call.return_lse and not call.return_stats:
        return o, lse_alone(stats[0])
    return o, AttentionStats(*stats) if call.return_stats else None


def _problem(call: AttentionCall) -> Problem:
    key_dim, value_dim = (-(-x.shape[3] // CHANNELS) * CHANNELS for x in (call.k, call.v))
    group = call.q.shape[2] // call.k.shape[2]
    return Problem(key_dim, value_dim, blocks=-(-group // ROWS), scale=call.scale, stats=call.return_stats)


def _pad(x: Array, after: Sequence[int]) -> Array:
    return jnp.pad(x, [(0, n) for n in after]) if any(after) else x


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(
    problem: Problem, q: Array, k: Array, v: Array | None, rows: Array, longest: Array | None
) -> tuple[Array, list[Array]]:
    """o and lse and, with statistics, maximum and entropy, [P * blocks, R], of what `chosen_kernels.Operands` describes; with statistics,
    `longest` [P * blocks, 1] has the lengths that `longest_keys` finds."""
    return _forward(problem, q, k, v, rows, longest)[0]


def _forward(problem: Problem, q: Array, k: Array, v: Array | None, rows: Array, longest: Array | None) -> Any:
    o, found = chosen_kernels.forward(problem, Operands(q, k, v, rows))
    results = o, [found[:, i, : q.shape[1]] for i in range(found.shape[1])]
    return results, (Operands(q, k, v, rows), longest, *results)


def _backward(problem: Problem, saved: Any, cotangents: tuple[Array, list[Array]]) -> Any:
    x, longest, o, found = saved
    d_o, d_found = cotangents
    delta = jnp.einsum("prv,prv->pr", d_o.astype(jnp.float32), o.astype(jnp.float32))
    read = gradient_rows(found, d_found, delta, near=lambda: ties(problem.scale, x.q, longest))
    given = [row * unit for row, unit in zip(read, (LOG2E, 1.0, LN2, 1.0, LOG2E))]
    if problem.stats:
        given[chosen_gradients.D_PEAK] *= jnp.exp(found[0] - found[1])  # joins the other terms before the weight multiplies them
    rows = jnp.stack(given, axis=1)
    rows = _pad(rows.astype(jnp.float32), (0, 0, ROWS - rows.shape[2]))
    d_q, d_k, d_v = chosen_gradients.gradients(problem, x, d_o, rows)
    return d_q, d_k.astype(x.k.dtype), None if x.v is None or d_v is None else d_v.astype(x.v.dtype), None, None


_gathered.defvjp(_forward, _backward)
