"""The GPU driver of the linear recurrences: what their Hopper kernels share in arguments, order and gradients.

A call is prepared (everything in a chunk that does not depend on the state), carried and combined. The backward pass prepares
again, so that between the passes only the arguments and the states [K, V] that enter each chunk are kept, in bfloat16.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels import gpu
from plait.kernels.chunking import segment_index
from plait.kernels.recurrence import (
    RecurrenceCall,
    Results,
    gpu_carry,
    gpu_inverse,
    gpu_scores,
    in_value_parts,
    log_decay_rate,
    summarize,
    token_norm,
    zero_where_padding,
)
from plait.kernels.recurrence.gpu_chunk import BF16, CHUNK, F32, Terms, split, total

Array = jax.Array

KEY_DIMS, VALUE_DIMS = (64, 128, 256), (64, 128, 256)
"""Head dims that fill whole tiles and fit; wider values are cut."""

MAX_VALUE_DIM, MAX_DELTA_VALUE_DIM = 256, 128
"""Channels of a value head that fit: of a decay, and of the delta rule, whose values have two terms."""

FORGET = -1e4
"""The log decay that ends a segment, and the strongest: its exponential is 0, alone or in any sum."""

LEAST = 1e-20
"""What a beta has at least: its gradient is a quotient by it."""


class Prepared(NamedTuple):
    """What the kernels read, after `plait.kernels.recurrence.Chunks`; rows are [B, T, H, X]."""

    q_in: Array
    """Rows of width K, float32."""
    k_out: Array
    """Rows of width K, float32."""
    decay: Array
    """[B, H, N, K] float32"""
    scores: Array
    """[B, H, N, C, C] bfloat16, with the delta rule float32."""
    own: Any = None
    """The delta rule's scores of keys, [B, H, N, C, C] float32."""
    k_in: Any = None
    """-K_in: rows of width K, float32."""
    beta: Any = None
    """[B, H, N, C] float32"""


def unsupported(call: RecurrenceCall) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    q, k, v = call.q, call.k, call.v
    if reason := gpu.unavailable():
        return reason
    dtypes = {x.dtype.name for x in (q, k, v)}
    if dtypes != {"bfloat16"}:
        return f"q, k and v are {', '.join(sorted(dtypes))}, not bfloat16 (float32 products would round to tf32)"
    parts = _value_parts(call)
    if q.shape[-1] not in KEY_DIMS or v.shape[-1] not in [parts * dim for dim in VALUE_DIMS]:
        return f"the head dims {q.shape[-1]} and {v.shape[-1]} are not of {KEY_DIMS} and {VALUE_DIMS} or a multiple of its last"
    if parts > 1 and call.return_stats:
        return f"values of {v.shape[-1]} channels are worked off in {parts} parts, whose statistics do not add up"
    if q.shape[1] == 1:
        return "one token is one step of the recurrence and fills no chunk"
    return None


def run(call: RecurrenceCall) -> Results:
    """See `plait.kernels.decay` and `plait.kernels.delta_rule`."""
    call = call.normalized()
    q, v, g, initial_state, segment_ids = call.q, call.v, call.g, call.initial_state, call.segment_ids
    if (parts := _value_parts(call)) > 1:
        return in_value_parts(run, call, parts)
    batch, length, heads, value_dim = v.shape
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, q.shape[-1], value_dim), jnp.float32)
    arguments = tuple(None if x is None else _fill(x) for x in (q, call.k, v, g, call.beta))
    ids = None if segment_ids is None else _fill(segment_ids)
    o, final_state, norms, writes = _recur(call.scale, call.return_stats, arguments, initial_state.astype(jnp.float32), ids)
    stats = None
    if call.return_stats:
        rates = jnp.zeros((batch, length, heads)) if g is None else log_decay_rate(g)
        if segment_ids is not None:
            rates = jnp.where((segment_ids != 0)[..., None], rates, 0)
        by_chunk = _fill(rates).reshape(batch, -1, CHUNK, heads).sum(2)
        stats = summarize(norms, writes, by_chunk, CHUNK, call)
    return o[:, :length], final_state, stats


def _value_parts(call: RecurrenceCall) -> int:
    return -(-call.v.shape[3] // (MAX_VALUE_DIM if call.beta is None else MAX_DELTA_VALUE_DIM))


def _fill(x: Array) -> Array:
    """[B, T, ...] with zeros up to whole chunks."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % CHUNK)] + [(0, 0)] * (x.ndim - 2))


def _prepare(
    segment_ids: Array | None, scale: float, heads: int, q: Array, k: Array, g: Array | None, beta: Array | None
) -> Prepared:
    """What depends neither on the values nor on the state; T is a multiple of C."""
    g = jnp.zeros((*q.shape[:2], heads), F32) if g is None else jnp.maximum(g.astype(F32), FORGET)
    beta = None if beta is None else beta.astype(F32)
    if segment_ids is not None:
        index, real = segment_index(segment_ids)
        starts = jnp.diff(index, axis=1, prepend=0) != 0
        q, k, g = (zero_where_padding(real, x) for x in (q, k, g))
        beta = None if beta is None else zero_where_padding(real, beta)
        g = jnp.where(starts.reshape(*starts.shape, *[1] * (g.ndim - 2)), FORGET, g)
    to_heads = lambda x: jnp.repeat(x, heads // x.shape[2], axis=2).astype(F32)
    channels = g if g.ndim == 4 else g[..., None]
    by_chunk = channels.reshape(g.shape[0], -1, CHUNK, *channels.shape[2:])  # [B, N, C, H, K or 1]
    since_start = jnp.exp(jnp.cumsum(by_chunk, axis=2))
    after = jnp.pad(by_chunk[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0)))
    to_end = jnp.exp(jax.lax.cumsum(after, axis=2, reverse=True))
    decay = jnp.moveaxis(since_start[:, :, -1], 2, 1)  # [B, H, N, K or 1]
    decay = jnp.broadcast_to(decay, (*decay.shape[:3], k.shape[-1]))
    since_start, to_end = (x.reshape(channels.shape) for x in (since_start, to_end))
    scores = gpu_scores.scores(beta is not None, scale, q, k, g)
    p = Prepared(scale * to_heads(q) * since_start, to_heads(k) * to_end, decay, *scores)
    if beta is None:
        return p
    return p._replace(k_in=-to_heads(k) * since_start, beta=gpu_scores.heads_to_lines(beta) + LEAST)


def _measure(k: Array, x: Array, states: Array, final: Array, segment_ids: Array | None) -> tuple[Array, Array]:
    """Norms of the leaving states and sums of |k| |x| by chunk, both [B, N, H]."""
    norms = token_norm(states.astype(jnp.float32).reshape(*states.shape[:3], -1))
    norms = jnp.concatenate([norms[:, :, 1:], token_norm(final.reshape(*final.shape[:2], -1))[..., None]], axis=2)
    key_norms = token_norm(k.astype(jnp.float32))
    writes = jnp.repeat(key_norms, x.shape[2] // k.shape[2], axis=2) * token_norm(x.astype(jnp.float32))
    if segment_ids is not None:
        writes = jnp.where((segment_ids != 0)[..., None], writes, 0)
    return jnp.moveaxis(norms, 1, 2), writes.reshape(x.shape[0], -1, CHUNK, x.shape[2]).sum(2)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recur(
    scale: float, measure: bool, arguments: tuple[Any, ...], initial: Array, segment_ids: Array | None
) -> tuple[Array, Array, Any, Any]:
    """o, the final state and what `_measure` gives, or None."""
    return _recur_forward(scale, measure, arguments, initial, segment_ids)[0]


def _recur_forward(scale: float, measure: bool, arguments: tuple[Any, ...], initial: Array, segment_ids: Array | None) -> Any:
    q, k, v, *gates = arguments
    p = _prepare(segment_ids, scale, v.shape[2], q, k, *gates)
    x: Terms = (v,)
    if p.beta is None:
        states, final, _ = gpu_carry.carry(p.decay, initial, add=(p.k_out.astype(BF16), v))
    else:
        erase, written = gpu_inverse.solve(p.own, p.beta, split(p.k_in), x)
        states, final, x = gpu_carry.carry(p.decay, initial, delta=gpu_carry.Delta(erase, split(p.k_out), written))
    (o,) = gpu_carry.combine(p.scores, x, p.q_in.astype(BF16), states)
    measured = _measure(k, total(x), states, final, segment_ids) if measure else (None, None)
    return (o, final, *measured), (arguments, states, segment_ids)


def _recur_backward(scale: float, measure: bool, saved: Any, cotangents: Any) -> Any:
    (arguments, states, segment_ids), (d_o, d_final, *_) = saved, cotangents
    q, k, v, *gates = arguments
    p, pull = jax.vjp(partial(_prepare, segment_ids, scale, v.shape[2]), q, k, *gates)
    x: Terms = (v,)
    y: Terms = ()
    q_in = p.q_in.astype(BF16)
    if p.beta is None:
        d_states, d_initial, _ = gpu_carry.carry(p.decay, d_final, add=(q_in, d_o), reverse=True)
        (d_v,) = gpu_carry.combine(p.scores, (d_o,), p.k_out.astype(BF16), d_states, transposed=True)
    else:
        beta = jnp.moveaxis(p.beta.reshape(*p.beta.shape[:2], -1), 1, 2)[..., None]  # [B, T, H, 1]
        erase, written = gpu_inverse.solve(p.own, p.beta, split(p.k_in), x)
        x = split(total(written) + _read(erase, states))
        base = gpu_carry.combine(p.scores, (d_o,), transposed=True, num_terms=2)
        read, base = gpu_inverse.solve(p.own, p.beta, split(p.k_out), base, transposed=True)
        delta = gpu_carry.Delta(read, split(beta * p.k_in), base)
        d_states, d_initial, y = gpu_carry.carry(p.decay, d_final, add=(q_in, d_o), delta=delta, reverse=True)
        d_v = (beta * total(y)).astype(v.dtype)
    g = gpu_carry.gradients(d_o, x, y, states, d_states)
    d_p = Prepared(g.rows[0].astype(F32), g.rows[1].astype(F32), g.decay, g.scores[0])
    if p.beta is not None:
        d_beta = jnp.diagonal(g.scores[1], axis1=-2, axis2=-1) / p.beta
        d_p = d_p._replace(own=-p.beta[..., None] * g.scores[1], k_in=beta * g.rows[2], beta=d_beta)
    d_q, d_k, *d_gates = pull(d_p)
    return (d_q, d_k, d_v, *d_gates), d_initial, None


def _read(rows: Terms, states: Array) -> Array:
    """rows S_n for every chunk, float32 rows of width V."""
    by_chunk = [x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]) for x in rows]
    read = [jnp.einsum("bnchk,bhnkv->bnchv", x, states, preferred_element_type=F32) for x in by_chunk]
    return reduce(jnp.add, read).reshape(*rows[0].shape[:-1], -1)


_recur.defvjp(_recur_forward, _recur_backward)
