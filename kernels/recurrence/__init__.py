"""What the linear recurrences share: the token-by-token scan of the references, and the chunk form around a decayed state.

Every op is S_t = Diag(exp g_t) S_{t-1} + k_t u_t^T and o_t = scale S_t^T q_t, u_t being v_t, or a pseudo value (delta rule).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels import chunking
from plait.kernels.chunking import dot
from plait.kernels.recurrence.call import SPAN, RecurrenceCall, RowsCall
from plait.kernels.shapes import accumulation_dtype

Array = jax.Array

MAX_VALUE_DIM = 256
"""Channels of a value head that the kernels work on at once; see `in_value_parts`."""

SLOWEST = 1e-9
"""Log decay a token below which a state counts as kept for ever."""


class RecurrenceStats(NamedTuple):
    """What a recurrence does, by spans of `SPAN` tokens; float32, S = ceil(T / SPAN) spans, constants to differentiation."""

    state_norm: Array
    """[B, S, Hv]: Frobenius norm of the state that leaves the span."""
    write_strength: Array
    """[B, S, Hv]: mean of |k_t| |u_t| over the span's real tokens, u_t being v_t or the delta rule's beta_t (v_t - R_t^T k_t)."""
    decay_horizon: Array
    """[B, S, Hv]: tokens after which the state has decayed by e, 1 / mean(-g) over the span's real tokens and all channels; at
    most 1e9, which also stands for no decay."""
    num_tokens: Array
    """[B, S, Hv]: real tokens. Means over several spans weigh write_strength and 1 / decay_horizon with it."""


Results = tuple[Array, Array, Any]
"""Outputs [B, T, Hv, V], final state [B, Hv, K, V] and the statistics, None where they are not wanted."""


def asked_for(o: Array, final_state: Array, stats: RecurrenceStats | None) -> tuple[Any, ...]:
    """As the public functions return them: without statistics that are not wanted."""
    return (o, final_state) if stats is None else (o, final_state, stats)


def value_parts(value_dim: int) -> int:
    """Into how many value heads of at most `MAX_VALUE_DIM` channels a wider one is cut."""
    return -(-value_dim // MAX_VALUE_DIM)


def in_value_parts(run: Callable[[RecurrenceCall], Results], call: RecurrenceCall, parts: int) -> Results:
    """The outputs and the final state of `run(call)` with value heads cut into a number of parts, of which V is a multiple.

    The columns of v do not meet in a recurrence. Statistics, norms over all columns, do not add up and are not given.
    """
    batch, length, heads, value_dim = call.v.shape
    g, beta = (None if x is None else jnp.repeat(x, parts, axis=2) for x in (call.g, call.beta))
    initial_state = call.initial_state
    if initial_state is not None:
        key_dim = initial_state.shape[2]
        initial_state = jnp.moveaxis(initial_state.reshape(batch, heads, key_dim, parts, -1), 3, 2)
        initial_state = initial_state.reshape(batch, heads * parts, key_dim, -1)
    v = call.v.reshape(batch, length, heads * parts, -1)
    o, final, _ = run(call.replace(v=v, g=g, beta=beta, initial_state=initial_state, return_stats=False))
    final = jnp.moveaxis(final.reshape(batch, heads, parts, *final.shape[2:]), 2, 3)
    return o.reshape(call.v.shape), final.reshape(*final.shape[:3], value_dim), None


def per_span(x: Array, chunk_size: int, length: int, *, last: bool) -> Array:
    """[B, N, H], a number for every chunk (of at most SPAN tokens), to [B, S, H]: the last of each span, or the sum."""
    chunks, spans = SPAN // chunk_size, -(-length // SPAN)
    x = x[:, : spans * chunks]
    x = jnp.pad(x, ((0, 0), (0, spans * chunks - x.shape[1]), (0, 0)), mode="edge" if last else "constant")
    x = x.reshape(x.shape[0], spans, chunks, x.shape[2])
    return x[:, :, -1] if last else x.sum(2)


def summarize(norms: Array, writes: Array, rates: Array, chunk_size: int, call: RecurrenceCall) -> RecurrenceStats:
    """The statistics of numbers by chunk, [B, N, Hv] each: the leaving state's norm, and sums of |k| |u| and of -g."""
    length = call.q.shape[1]
    real = jnp.ones((norms.shape[0], length)) if call.segment_ids is None else call.segment_ids != 0
    count = per_span(real.astype(jnp.float32)[..., None], 1, length, last=False)
    mean = lambda x: per_span(x, chunk_size, length, last=False) / jnp.maximum(count, 1)
    horizon = 1 / jnp.maximum(mean(rates), SLOWEST)
    stats = RecurrenceStats(
        per_span(norms, chunk_size, length, last=True), mean(writes), horizon, jnp.broadcast_to(count, horizon.shape)
    )
    return jax.lax.stop_gradient(jax.tree.map(lambda x: x.astype(jnp.float32), stats))


def with_ones(v: Array) -> Array:
    """v [B, T, H, V] with a column of ones, under which a state sums its keys."""
    return jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], axis=-1)


def over_weights(o: Array) -> Array:
    """The outputs [..., V] of `with_ones` divided by their last column, the summed weights (Based, arXiv 2402.18668: plus 1e-12)."""
    return o[..., :-1] / (o[..., -1:] + 1e-12)


def token_norm(x: Array) -> Array:
    """The length of the last axis' vectors."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=-1))


def zero_where_padding(real: Array, x: Array) -> Array:
    """x [B, T, ...] with zeros at padding."""
    return jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0)


def scan_tokens(step: Callable[..., tuple[Array, Array, Array]], call: RecurrenceCall) -> Results:
    """The outputs, the final state and, when asked, the statistics of one token after another.

    `step(state, q, k, v, *gates) -> (state, o, u)`, u [B, Hv, V] being written under k; gates are the call's. Padding is skipped: it
    gives zeros and leaves the state alone. Gates must be neutral at 0.
    """
    q, k, v, initial_state = call.q, call.k, call.v, call.initial_state
    dtype = accumulation_dtype(q, k, v)
    batch, _, num_heads, value_dim = v.shape
    inputs = [jnp.repeat(x, num_heads // x.shape[2], axis=2).astype(dtype) for x in (q, k, v, *call.gates)]
    state = jnp.zeros((batch, num_heads, k.shape[3], value_dim), dtype) if initial_state is None else initial_state.astype(dtype)
    starts = jnp.zeros(v.shape[:2], bool)
    if call.segment_ids is not None:
        index, real = chunking.segment_index(call.segment_ids)
        inputs = [zero_where_padding(real, x) for x in inputs]
        starts = jnp.diff(index, axis=1, prepend=0) != 0

    def body(state: Array, token: tuple[Array, list[Array]]) -> tuple[Array, tuple[Array, ...]]:
        start, inputs = token
        state, o, written = step(jnp.where(start[:, None, None, None], 0, state), *inputs)
        if not call.return_stats:
            return state, (o,)
        norms = token_norm(state.reshape(*state.shape[:2], -1))
        return state, (o, norms, token_norm(inputs[1]) * token_norm(written))

    final_state, outputs = jax.lax.scan(body, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (starts, inputs)))
    o, *sums = (jnp.moveaxis(x, 0, 1) for x in outputs)
    stats = None
    if call.return_stats:
        norms, writes = sums
        stats = summarize(norms, writes, log_decay_rate(inputs[3]), 1, call)
    return o.astype(q.dtype), final_state, stats


def log_decay_rate(g: Array) -> Array:
    """-g [B, T, H] of log decays [B, T, H] or [B, T, H, K or 1], a mean over channels."""
    return -(g if g.ndim == 3 else jnp.mean(g, axis=-1))


class Chunks(NamedTuple):
    """A sequence cut into chunks, with everything that does not depend on the state; arrays head-major `[B, Hv, N, C, ...]`."""

    q: Array
    """[..., C, K], scaled."""
    k: Array
    v: Any
    """None where only the weights on it are wanted."""
    g: Array
    """[..., C, K], or [..., C, 1] when all channels decay alike."""
    gates: tuple[Array, ...]
    """[..., C, 1] each."""
    pairs: Array | None
    """[B, 1, N, C, C], 1 where two tokens share a segment; None when there is one segment."""
    q_in: Array
    """q decayed since the chunk's start, 0 in a segment begun inside: reads the entering state."""
    k_in: Array
    """k likewise."""
    k_out: Array
    """k decayed to the chunk's end, 0 in a segment ended inside: writes the leaving state."""
    decay: Array
    """[..., K or 1]: what the chunk leaves of the entering state."""


def cut(call: RecurrenceCall) -> Chunks:
    """Cuts a call, of any T, into chunks."""
    g, *gates = call.gates
    dtype = accumulation_dtype(call.q, call.k)
    chunk_size = chunking.fit_chunk_size(call.chunk_size, call.q.shape[1])
    inputs: list[Any] = [
        call.q.astype(dtype) * call.scale,
        call.k.astype(dtype),
        None if call.v is None else call.v.astype(dtype),
        g.astype(dtype),
        *(x[..., None].astype(dtype) for x in gates),
    ]
    bounds = None
    if call.segment_ids is not None:
        index, real = chunking.segment_index(call.segment_ids)
        inputs = [None if x is None else zero_where_padding(real, x) for x in inputs]
        bounds = chunking.boundaries(index, chunk_size, dtype)
    cut_inputs: list[Any] = [None if x is None else chunking.heads_to_chunks(x, chunk_size, call.num_heads) for x in inputs]
    q, k, v, g, *chunk_gates = cut_inputs
    since_start, to_end = (jnp.exp(x) for x in chunking.decay_sums(g))
    decay = since_start[..., -1, :]
    if bounds is not None:
        since_start, to_end = since_start * bounds.head[..., None], to_end * bounds.tail[..., None]
        decay = decay * bounds.through[..., None]
    pairs = None if bounds is None else bounds.pairs
    return Chunks(q, k, v, g, tuple(chunk_gates), pairs, q * since_start, k * since_start, k * to_end, decay)


def scores(q: Array, c: Chunks) -> Array:
    """Decayed products inside each chunk, [..., C, C]: q_i with k_j for j <= i in the same segment, else 0."""
    if c.g.shape[-1] == 1:
        products = dot("...ik,...jk->...ij", q, c.k) * chunking.decay_between(c.g)
    else:
        products = chunking.decayed_scores(q, c.k, c.g)
    return products if c.pairs is None else products * c.pairs


def scan_chunks(
    advance: Callable[[Array, tuple[Array, ...]], tuple[Array, Any]],
    inputs: tuple[Array, ...],
    initial_state: Array | None,
    shape: tuple,
) -> tuple[Array, Array]:
    """Scans `advance(state, inputs of one chunk) -> (state, output)` over axis 2; the outputs get that axis back."""
    state = jnp.zeros(shape, inputs[0].dtype) if initial_state is None else initial_state.astype(inputs[0].dtype)
    final_state, outputs = jax.lax.scan(advance, state, jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), inputs))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), outputs), final_state


def chunk_stats(c: Chunks, written: Array, entering: Array, final_state: Array, call: RecurrenceCall) -> RecurrenceStats:
    """The statistics of chunks that wrote `written` [B, H, N, C, V], from the states [B, H, N, K, V] that entered them."""
    leaving = jnp.concatenate([entering[:, :, 1:], final_state[:, :, None]], axis=2)
    norms = token_norm(leaving.reshape(*leaving.shape[:3], -1))
    writes = jnp.sum(token_norm(c.k) * token_norm(written), axis=-1)
    rates = jnp.sum(log_decay_rate(c.g), axis=-1)
    norms, writes, rates = (jnp.moveaxis(x, 1, 2) for x in (norms, writes, rates))
    return summarize(norms, writes, rates, c.k.shape[3], call)


def decayed_attention(c: Chunks, *, initial_state: Array | None) -> tuple[Array, Array, Array]:
    """Outputs [B, Hv, N, C, V], final state and entering states of a recurrence that only decays and adds (no delta rule)."""
    writes = dot("...ck,...cv->...kv", c.k_out, c.v)

    def advance(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        decay, write = chunk
        return decay[..., None] * state + write, state

    entering, final_state = scan_chunks(advance, (c.decay, writes), initial_state, writes.shape[:2] + writes.shape[3:])
    o = dot("...ck,...kv->...cv", c.q_in, entering) + dot("...ij,...jv->...iv", scores(c.q, c), c.v)
    return o, final_state, entering


def implied_rows(c: Chunks, call: RowsCall, *, inverse: Array | None = None) -> tuple[Array, Array]:
    """Implied attention A [B, Hv, R, T], o[rows] = A @ v from a zero initial state, and what then reads the initial state [B, Hv, R, K].

    A reader r [K] per row walks the chunks backwards. It starts as the row's query, decayed to the start of its chunk; each
    earlier chunk is read as (k_out r) and decays r. With the delta rule, `inverse` = (I + L)^-1 Diag(beta) turns what is read
    into weights on v, and what the chunk erased is taken from r. All exponents are at most 0; the cost is O(R T K).
    """
    rows, length = call.rows, call.q.shape[1]
    batch, num_heads, num_chunks, chunk_size, key_dim = c.k.shape
    home, offset = rows // chunk_size, rows % chunk_size
    dtype = c.k.dtype
    q_in = c.q_in[:, :, home, offset]  # [B, H, R, K]
    pairs = None if c.pairs is None else c.pairs[:, :, home, offset]  # [B, 1, R, C]
    within = _home_scores(c, home, offset)  # [B, H, R, C]
    if pairs is not None:
        within = within * pairs
    erase = None if inverse is None else dot("...ij,...jk->...ik", inverse, c.k_in)  # W

    def visit(reader: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        number, k_out, decay, *delta = chunk
        here = (home == number)[None, None, :, None]
        read = jnp.where(here, within, dot("bhck,bhrk->bhrc", k_out, reader))  # [B, H, R, C]
        passed = jnp.where(here, q_in, decay[:, :, None, :] * reader)
        if delta:
            inverse, erase = delta
            passed = passed - dot("bhrc,bhck->bhrk", read, erase)
            read = dot("bhrc,bhcj->bhrj", read, inverse)
        return passed, read

    chunks = (c.k_out, c.decay) if inverse is None else (c.k_out, c.decay, inverse, erase)
    chunks = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), chunks)
    start = jnp.zeros((batch, num_heads, rows.shape[0], key_dim), dtype) if call.reader is None else call.reader.astype(dtype)
    left, weights = jax.lax.scan(visit, start, (jnp.arange(num_chunks), *chunks), reverse=True)
    return jnp.moveaxis(weights, 0, 3).reshape(batch, num_heads, rows.shape[0], -1)[..., :length], left


def _home_scores(c: Chunks, home: Array, offset: Array) -> Array:
    """The scores of given rows inside their own chunk, [B, H, R, C], summed over channels one by one."""
    q, k, g = c.q[:, :, home, offset], c.k[:, :, home], c.g[:, :, home]  # [B, H, R, K], [B, H, R, C, K], [B, H, R, C, K or 1]
    tokens = jnp.arange(c.k.shape[3])[None, :]
    upto = (tokens <= offset[:, None])[..., None]  # [R, C, 1]
    decay = jnp.where(upto, jnp.exp(chunking.decay_sums(jnp.where(upto, g, 0))[1]), 0)
    return jnp.sum(q[..., None, :] * k * decay, axis=-1)
