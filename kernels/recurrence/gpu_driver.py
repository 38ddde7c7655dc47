"""The GPU driver of the linear recurrences: what their Hopper kernels share in arguments, order and gradients.

A call is prepared (everything in a chunk that does not depend on the state), carried and combined. The backward pass prepares
again, so that between the passes only the arguments and the states [K, V] that enter each chunk are kept, in bfloat16.
"""

from functools import partial
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
    value_parts,
    zero_where_padding,
)
from plait.kernels.recurrence.gpu_chunk import CHUNK

Array = jax.Array

KEY_DIMS, VALUE_DIMS = (64, 128, 256), (64, 128, 256)
"""Head dims that fill whole tiles and fit; wider values are cut."""

FORGET = -1e4
"""The log decay that ends a segment, and the strongest: its exponential is 0, alone or in any sum."""


class Prepared(NamedTuple):
    """What the kernels read, after `plait.kernels.recurrence.Chunks`; rows are [B, T, H, X]."""

    q_in: Array
    """Rows of width K, bfloat16."""
    k_out: Array
    """Rows of width K, bfloat16."""
    decay: Array
    """[B, H, N, K] float32"""
    scores: Array
    """[B, H, N, C, C] bfloat16"""
    values: Array
    """Rows of width V, bfloat16: v, or U of the delta rule."""
    erase: Array | None = None
    """-W of the delta rule: rows of width K, bfloat16."""


def unsupported(call: RecurrenceCall) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    q, k, v = call.q, call.k, call.v
    if reason := gpu.unavailable():
        return reason
    dtypes = {x.dtype.name for x in (q, k, v)}
    if dtypes != {"bfloat16"}:
        return f"q, k and v are {', '.join(sorted(dtypes))}, not bfloat16 (float32 products would round to tf32)"
    parts = value_parts(v.shape[-1])
    if q.shape[-1] not in KEY_DIMS or v.shape[-1] not in [parts * dim for dim in VALUE_DIMS]:
        return f"the head dims {q.shape[-1]} and {v.shape[-1]} are not of {KEY_DIMS} and {VALUE_DIMS} or a multiple of its last"
    if parts > 1 and call.return_stats:
        return f"values of {v.shape[-1]} channels are worked off in {parts} parts, whose statistics do not add up"
    if q.shape[1] == 1:
        return "one token is one step of the recurrence and fills no chunk"
    return None


def run(call: RecurrenceCall) -> Results:
    """See `plait.kernels.decay` and `plait.kernels.delta_rule`."""
    q, v, g, initial_state, segment_ids = call.q, call.v, call.g, call.initial_state, call.segment_ids
    if value_parts(v.shape[3]) > 1:
        return in_value_parts(run, call)
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


def _fill(x: Array) -> Array:
    """[B, T, ...] with zeros up to whole chunks."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % CHUNK)] + [(0, 0)] * (x.ndim - 2))


def _prepare(
    segment_ids: Array | None, scale: float, q: Array, k: Array, v: Array, g: Array | None, beta: Array | None
) -> Prepared:
    """What does not depend on the state; T is a multiple of C."""
    g = jnp.zeros(v.shape[:3], jnp.float32) if g is None else jnp.maximum(g.astype(jnp.float32), FORGET)
    beta = None if beta is None else beta.astype(jnp.float32)
    if segment_ids is not None:
        index, real = segment_index(segment_ids)
        starts = jnp.diff(index, axis=1, prepend=0) != 0
        q, k, g = (zero_where_padding(real, x) for x in (q, k, g))
        beta = None if beta is None else zero_where_padding(real, beta)
        g = jnp.where(starts.reshape(*starts.shape, *[1] * (g.ndim - 2)), FORGET, g)
    to_heads = lambda x: jnp.repeat(x, v.shape[2] // x.shape[2], axis=2).astype(jnp.float32)
    channels = g if g.ndim == 4 else g[..., None]
    by_chunk = channels.reshape(g.shape[0], -1, CHUNK, *channels.shape[2:])  # [B, N, C, H, K or 1]
    since_start = jnp.exp(jnp.cumsum(by_chunk, axis=2))
    after = jnp.pad(by_chunk[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0)))
    to_end = jnp.exp(jax.lax.cumsum(after, axis=2, reverse=True))
    decay = jnp.moveaxis(since_start[:, :, -1], 2, 1)  # [B, H, N, K or 1]
    decay = jnp.broadcast_to(decay, (*decay.shape[:3], k.shape[-1]))
    since_start, to_end = (x.reshape(channels.shape) for x in (since_start, to_end))
    q_in = (scale * to_heads(q) * since_start).astype(v.dtype)
    k_out = (to_heads(k) * to_end).astype(v.dtype)
    scores, *own = gpu_scores.scores(beta is not None, scale, q, k, g)
    if beta is None:
        return Prepared(q_in, k_out, decay, scores, v)
    k_in = (-to_heads(k) * since_start).astype(v.dtype)
    written, erase = gpu_inverse.write(*own, gpu_scores.heads_to_lines(beta), k_in, v)
    return Prepared(q_in, k_out, decay, scores, written, erase)


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
    p = _prepare(segment_ids, scale, *arguments)
    if p.erase is None:
        states, final, _ = gpu_carry.carry(p.decay, initial, add=(p.k_out, p.values))
        x = p.values
    else:
        states, final, x = gpu_carry.carry(p.decay, initial, delta=gpu_carry.Delta(p.erase, p.k_out, p.values))
    o = gpu_carry.combine(p.scores, x, p.q_in, states)
    measured = _measure(arguments[1], x, states, final, segment_ids) if measure else (None, None)
    return (o, final, *measured), (arguments, states, segment_ids)


def _recur_backward(scale: float, measure: bool, saved: Any, cotangents: Any) -> Any:
    (arguments, states, segment_ids), (d_o, d_final, *_) = saved, cotangents
    p, pull = jax.vjp(partial(_prepare, segment_ids, scale), *arguments)
    x, d_x = p.values, None
    if p.erase is None:
        d_states, d_initial, _ = gpu_carry.carry(p.decay, d_final, add=(p.q_in, d_o), reverse=True)
        d_values = gpu_carry.combine(p.scores, d_o, p.k_out, d_states, transposed=True)
    else:
        erase = p.erase.reshape(p.erase.shape[0], -1, CHUNK, *p.erase.shape[2:])
        erased = jnp.einsum("bnchk,bhnkv->bnchv", erase, states, preferred_element_type=jnp.float32)
        x = (p.values + erased.reshape(p.values.shape)).astype(p.values.dtype)
        delta = gpu_carry.Delta(p.k_out, p.erase, gpu_carry.combine(p.scores, d_o, transposed=True))
        d_states, d_initial, d_x = gpu_carry.carry(p.decay, d_final, add=(p.q_in, d_o), delta=delta, reverse=True)
        d_values = d_x
    g = gpu_carry.gradients(d_o, x, d_x, states, d_states)
    return pull(Prepared(g.q_in, g.k_out, g.decay, g.scores, d_values, g.erase)), d_initial, None


_recur.defvjp(_recur_forward, _recur_backward)
