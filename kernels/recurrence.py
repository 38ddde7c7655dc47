"""What the linear recurrences share: the token-by-token scan of the references, and the chunk form around a decayed state.

Every op is S_t = Diag(exp g_t) S_{t-1} + k_t u_t^T and o_t = scale S_t^T q_t, u_t being v_t, or a pseudo value (delta rule).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels import chunking
from plait.kernels.chunking import dot
from plait.kernels.shapes import accumulation_dtype
from plait.kernels.sharding import Axes

Array = jax.Array

AXES = Axes(
    arguments=("bthk",), options={"initial_state": "bhkv", "segment_ids": "bt"}, results=("bthv", "bhkv"), statistics="bnh"
)
"""The axes of the linear recurrences' arrays: q, k, v and gates are [B, T, H, ...]."""


def _zero_where_padding(real: Array, x: Array) -> Array:
    """x [B, T, ...] with zeros at padding."""
    return jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0)


def scan_tokens(
    step: Callable[..., tuple[Array, Array]],
    q: Array,
    k: Array,
    v: Array,
    *gates: Array,
    initial_state: Array | None,
    segment_ids: Array | None,
) -> tuple[Array, Array]:
    """The outputs [B, T, Hv, V] and the final state of one token after another: `step(state, q, k, v, *gates) -> (state, o)`.

    Padding is skipped: it gives zeros and leaves the state alone. Gates must be neutral at 0.
    """
    dtype = accumulation_dtype(q, k, v)
    batch, _, num_heads, value_dim = v.shape
    inputs = [jnp.repeat(x, num_heads // x.shape[2], axis=2).astype(dtype) for x in (q, k, v, *gates)]
    state = jnp.zeros((batch, num_heads, k.shape[3], value_dim), dtype) if initial_state is None else initial_state.astype(dtype)
    starts = jnp.zeros(v.shape[:2], bool)
    if segment_ids is not None:
        index, real = chunking.segment_index(segment_ids)
        inputs = [_zero_where_padding(real, x) for x in inputs]
        starts = jnp.diff(index, axis=1, prepend=0) != 0

    def body(state: Array, token: tuple[Array, list[Array]]) -> tuple[Array, Array]:
        start, inputs = token
        return step(jnp.where(start[:, None, None, None], 0, state), *inputs)

    final_state, o = jax.lax.scan(body, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (starts, inputs)))
    return jnp.moveaxis(o, 0, 1).astype(q.dtype), final_state


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


def cut(
    q: Array,
    k: Array,
    v: Array | None,
    g: Array,
    *gates: Array,
    num_heads: int,
    scale: float,
    segment_ids: Array | None,
    chunk_size: int,
) -> Chunks:
    """Cuts token-major arguments, of any T, into chunks; g is [B, T, Hv, K] or [B, T, Hv, 1], other gates [B, T, Hv, 1]."""
    dtype = accumulation_dtype(q, k)
    chunk_size = chunking.fit_chunk_size(chunk_size, q.shape[1])
    inputs: list[Any] = [
        q.astype(dtype) * scale,
        k.astype(dtype),
        None if v is None else v.astype(dtype),
        *(x.astype(dtype) for x in (g, *gates)),
    ]
    bounds = None
    if segment_ids is not None:
        index, real = chunking.segment_index(segment_ids)
        inputs = [None if x is None else _zero_where_padding(real, x) for x in inputs]
        bounds = chunking.boundaries(index, chunk_size, dtype)
    cut_inputs: list[Any] = [None if x is None else chunking.heads_to_chunks(x, chunk_size, num_heads) for x in inputs]
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


def decayed_attention(c: Chunks, *, initial_state: Array | None) -> tuple[Array, Array]:
    """Outputs [B, Hv, N, C, V] and final state of a recurrence that only decays and adds (no delta rule)."""
    writes = dot("...ck,...cv->...kv", c.k_out, c.v)

    def advance(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        decay, write = chunk
        return decay[..., None] * state + write, state

    entering, final_state = scan_chunks(advance, (c.decay, writes), initial_state, writes.shape[:2] + writes.shape[3:])
    o = dot("...ck,...kv->...cv", c.q_in, entering) + dot("...ij,...jv->...iv", scores(c.q, c), c.v)
    return o, final_state


def implied_rows(c: Chunks, rows: Array, length: int, *, inverse: Array | None = None) -> Array:
    """Implied attention A [B, Hv, R, T]: o[rows] = A @ v from a zero initial state.

    A reader r [K] per row walks the chunks backwards. It starts as the row's query, decayed to the start of its chunk; each
    earlier chunk is read as (k_out r) and decays r. With the delta rule, `inverse` = (I + L)^-1 Diag(beta) turns what is read
    into weights on v, and what the chunk erased is taken from r. All exponents are at most 0; the cost is O(R T K).
    """
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
    reader = jnp.zeros((batch, num_heads, rows.shape[0], key_dim), dtype)
    _, weights = jax.lax.scan(visit, reader, (jnp.arange(num_chunks), *chunks), reverse=True)
    return jnp.moveaxis(weights, 0, 3).reshape(batch, num_heads, rows.shape[0], -1)[..., :length]


def _home_scores(c: Chunks, home: Array, offset: Array) -> Array:
    """The scores of given rows inside their own chunk, [B, H, R, C], summed over channels one by one."""
    q, k, g = c.q[:, :, home, offset], c.k[:, :, home], c.g[:, :, home]  # [B, H, R, K], [B, H, R, C, K], [B, H, R, C, K or 1]
    tokens = jnp.arange(c.k.shape[3])[None, :]
    upto = (tokens <= offset[:, None])[..., None]  # [R, C, 1]
    decay = jnp.where(upto, jnp.exp(chunking.decay_sums(jnp.where(upto, g, 0))[1]), 0)
    return jnp.sum(q[..., None, :] * k * decay, axis=-1)
