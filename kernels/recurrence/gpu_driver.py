"""The GPU driver of the linear recurrences: what their Hopper kernels share in arguments, order and gradients.

A call is prepared (the scores and the inverse of every chunk, which do not depend on the state) and carried. Between the passes the
arguments, the states [K, V] that enter every second chunk, in bfloat16, and, instead of the delta rule's values, what it wrote are kept.
What was prepared is kept where it takes no more memory than the states of all chunks, and else prepared again.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from plait.kernels import gpu
from plait.kernels.chunking import segment_index
from plait.kernels.recurrence import (
    RecurrenceCall,
    Results,
    gpu_by_channel,
    gpu_carry,
    gpu_gradients,
    gpu_scores,
    log_decay_rate,
    summarize,
    token_norm,
)
from plait.kernels.recurrence.gpu_chunk import BLOCK, CHUNK, F32, PAIR, Factors, Scaled, Terms, total
from plait.kernels.recurrence.gpu_scores import FORGET, Lines, Marks, heads_to_lines
from plait.kernels.recurrence.gpu_sums import Sums

Array = jax.Array

KEY_DIMS = (64, 128, 256)
"""Head dims of keys that fill whole tiles and fit; those of values are multiples of 64."""

LEAST = 1e-20
"""What a beta has at least: its gradient is a quotient by it."""


def unsupported(call: RecurrenceCall) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    q, k, v = call.q, call.k, call.v
    if reason := gpu.unavailable():
        return reason
    dtypes = {x.dtype.name for x in (q, k, v)}
    if dtypes != {"bfloat16"}:
        return f"q, k and v are {', '.join(sorted(dtypes))}, not bfloat16 (float32 products would round to tf32)"
    if q.shape[-1] not in KEY_DIMS or v.shape[-1] % BLOCK:
        return f"the head dims {q.shape[-1]} and {v.shape[-1]} are not of {KEY_DIMS} and a multiple of {BLOCK}"
    if q.shape[1] == 1:
        return "one token is one step of the recurrence and fills no chunk"
    return None


def run(call: RecurrenceCall) -> Results:
    """See `plait.kernels.decay` and `plait.kernels.delta_rule`."""
    call = call.normalized()
    q, v, g, segment_ids = call.q, call.v, call.g, call.segment_ids
    batch, length, heads, _ = v.shape
    initial_state = None if call.initial_state is None else call.initial_state.astype(jnp.float32)
    decay = jnp.zeros((batch, length, heads)) if g is None else g
    arguments = tuple(None if x is None else _fill(x) for x in (q, call.k, v, decay, call.beta))
    ids = None if segment_ids is None else _fill(segment_ids)
    o, final_state, norms, writes = _recur(call.scale, call.return_stats, arguments, initial_state, ids)
    stats = None
    if call.return_stats:
        rates = log_decay_rate(decay)
        if segment_ids is not None:
            rates = jnp.where((segment_ids != 0)[..., None], rates, 0)
        by_chunk = _fill(rates).reshape(batch, -1, CHUNK, heads).sum(2)
        stats = summarize(norms, writes, by_chunk, CHUNK, call)
    return o[:, :length], final_state, stats


def _fill(x: Array) -> Array:
    """[B, T, ...] with zeros up to whole pairs of chunks."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % (PAIR * CHUNK))] + [(0, 0)] * (x.ndim - 2))


def _marks(segment_ids: Array | None, like: Array) -> Marks:
    """What is known of the tokens of `like` [B, T, ...]."""
    if segment_ids is None:
        real = jnp.ones((like.shape[0], 1, like.shape[1] // CHUNK, CHUNK), F32)
        return Marks(real, jnp.zeros_like(real))
    index, real = segment_index(segment_ids)
    starts = jnp.diff(index, axis=1, prepend=0) != 0
    return Marks(*(heads_to_lines(x[..., None].astype(F32)) for x in (real, starts)))


def _beta(marks: Marks, beta: Array) -> Array:
    return marks.real * heads_to_lines(beta.astype(F32)) + LEAST


def _lines(marks: Marks, scale: float, g: Array, beta: Array | None) -> tuple[Lines, Array]:
    """The numbers of tokens for g [B, T, H], and the decays of whole chunks [B, H, N]; no exponent is a difference of sums."""
    g = heads_to_lines(jnp.maximum(g.astype(F32), FORGET))
    g = jnp.where(marks.starts > 0, FORGET, marks.real * g)
    since_start = jnp.exp(jnp.cumsum(g, axis=-1))
    after = jnp.pad(g[..., 1:], ((0, 0), (0, 0), (0, 0), (0, 1)))
    to_end = jnp.exp(jax.lax.cumsum(after, axis=3, reverse=True))
    lines = Lines(jnp.broadcast_to(marks.real, g.shape), g, scale * marks.real * since_start, marks.real * to_end)
    if beta is not None:
        lines = lines._replace(k_in=since_start, beta=_beta(marks, beta))
    return lines, since_start[..., -1]


def _shared(prepared: tuple[Terms, Terms], lines: Lines, decay: Array, q: Array, k: Array) -> Factors:
    """What the passes read where all channels share one decay, of what `gpu_scores.shared` gives."""
    scores, inverse = prepared
    decay = jnp.broadcast_to(decay[..., None], (*decay.shape, q.shape[3]))
    return Factors(
        Scaled((q,), lines.q_in), Scaled((k,), lines.k_out), decay, scores, inverse, lines.beta, Scaled((), lines.k_in)
    )


def _kept(prepared: Any, states_bytes: int) -> Any:
    """What was prepared, or None where it takes more memory than the states of all chunks."""
    return prepared if sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(prepared)) <= states_bytes else None


def _every(v: Array, g: Array, beta: Array | None) -> int:
    """Every how many chunks the backward pass is given the state and its gradient.

    With a decay by channel those between are made from rows that it would not read else: Q_in, K_out and K_in.
    """
    rows = 0 if g.ndim == 3 else 2 if beta is None else 5  # [T, K] bfloat16, read
    matrices = 4 * v.shape[3] / (CHUNK * PAIR)  # likewise, neither written nor read
    return PAIR if matrices > rows else 1


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
    scale: float, measure: bool, arguments: tuple[Any, ...], initial: Array | None, segment_ids: Array | None
) -> tuple[Array, Array, Any, Any]:
    """o, the final state and what `_measure` gives, or None."""
    return _run(scale, measure, int(measure), arguments, initial, segment_ids)[0]


def _run(
    scale: float, measure: bool, keep: int, arguments: tuple[Any, ...], initial: Array | None, segment_ids: Array | None
) -> Any:
    """The results, what was prepared, what was written and the states, which are there if the gradients are wanted."""
    q, k, v, g, beta = arguments
    marks = _marks(segment_ids, v)
    prepared: Any
    if g.ndim == 3:
        lines, decay = _lines(marks, scale, g, beta)
        prepared = gpu_scores.shared(scale, q, k, lines)
        factors = _shared(prepared, lines, decay, q, k)
    else:
        prepared = factors = gpu_by_channel.factors(
            scale, q, k, g.astype(F32), marks, None if beta is None else _beta(marks, beta)
        )
    o, final, states, x = gpu_carry.forward(factors, v, initial, keep=keep)
    measured = _measure(k, total(x), states, final, segment_ids) if measure else (None, None)
    return (o, final, *measured), prepared, x, states


def _recur_forward(scale: float, measure: bool, *primals: Any) -> Any:
    is_primal = lambda x: isinstance(x, CustomVJPPrimal)
    arguments, initial, segment_ids = jax.tree.map(lambda x: x.value, primals, is_leaf=is_primal)
    q, k, v, *gates = arguments
    every = _every(v, *gates)
    results, prepared, x, states = _run(scale, measure, 1 if measure else every, arguments, initial, segment_ids)
    if measure:
        states = states[:, :, ::every]
    prepared = _kept(prepared, 2 * results[1].size * (v.shape[1] // CHUNK))
    return results, ((q, k, *gates), prepared, x, states, None if initial is None else (), segment_ids)


def _recur_backward(scale: float, measure: bool, saved: Any, cotangents: Any) -> Any:
    ((q, k, g, beta), prepared, x, states, has_initial, segment_ids), (d_o, d_final, *_) = saved, cotangents
    d_o = jnp.zeros(d_o.shape, d_o.dtype) if isinstance(d_o, SymbolicZero) else d_o
    d_final = None if isinstance(d_final, SymbolicZero) else d_final
    back = partial(_backward, x=x, states=states, d_o=d_o, d_final=d_final, to_initial=has_initial is not None)
    marks = _marks(segment_ids, q)
    if g.ndim == 3:
        (lines, decay), pull = jax.vjp(partial(_lines, marks, scale), g, beta)
        factors = _shared(prepared or gpu_scores.shared(scale, q, k, lines), lines, decay, q, k)
        d_v, d_initial, sums = back(factors)
        d_q, d_k, d_decay, d_lines = gpu_gradients.of_shared(sums, scale, lines)
        d_g, d_beta = pull((d_lines, d_decay.sum(-1)))
    else:
        betas, pull_beta = jax.vjp(partial(jax.tree.map, partial(_beta, marks)), beta)
        factors = prepared or gpu_by_channel.factors(scale, q, k, g.astype(F32), marks, betas)
        d_v, d_initial, sums = back(factors)
        d = gpu_gradients.of_rows(sums)
        d_q, (d_k, d_g) = gpu_by_channel.gradients(
            scale, q, k, g.astype(F32), marks, betas, rows=d.rows, scores=d.squares, decay=d.decay
        )
        (d_beta,) = pull_beta(None if betas is None else jnp.diagonal(d.squares[1], axis1=-2, axis2=-1) / betas)
        d_g = d_g.astype(g.dtype)
    return (gpu_scores.of_group(d_q, q), gpu_scores.of_group(d_k, k), d_v, d_g, d_beta), d_initial, None


def _backward(
    factors: Factors, *, x: Terms, states: Array, d_o: Array, d_final: Array | None, to_initial: bool
) -> tuple[Array, Array | None, Sums]:
    """The gradients of the values and, where wanted, of the initial state, and what the others are sums of."""
    every = factors.decay.shape[2] // states.shape[2]
    d_v, d_initial, d_states, y = gpu_carry.backward(factors, d_o, d_final, keep=every, to_initial=to_initial)
    return d_v, d_initial, Sums(factors, (d_o, *x, *y), states, d_states)


_recur.defvjp(_recur_forward, _recur_backward, symbolic_zeros=True)
