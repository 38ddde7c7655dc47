"""The chunk form: what a chunk's tokens read along `a` is one triangular inverse away from its values and the entering state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels import chunking, recurrence
from plait.kernels.chunking import dot
from plait.kernels.dplr import reference
from plait.kernels.dplr.call import DPLRCall
from plait.kernels.recurrence import Chunks, Results

Array = jax.Array


class Moves(NamedTuple):
    """What `a` and `b` are to the chunks, `[B, Hv, N, C, ...]`."""

    a_in: Array
    """a decayed since the chunk's start up to the token before, 0 in a segment begun inside: reads the entering state."""
    b_out: Array
    """b decayed to the chunk's end, 0 in a segment ended inside: writes the leaving state."""
    a_k: Array
    """[..., C, C]: what a_i reads of k_j, j < i."""
    a_b: Array
    q_k: Array
    """[..., C, C]: what q_i reads of k_j, j <= i."""
    q_b: Array


def cut(call: DPLRCall) -> tuple[Chunks, Moves]:
    """The chunks and the scores between their tokens.

    a_i reads the state that token i - 1 left. As a query of token i - 1 it has just those decays, so it is moved up by one token, and
    its scores down again.
    """
    c = recurrence.cut(call)
    a, b = (x[..., 0] for x in c.gates)
    up = jnp.concatenate([a[..., 1:, :], jnp.zeros_like(a[..., :1, :])], axis=-2)
    down = lambda x, first: jnp.concatenate([jnp.full_like(x[..., :1, :], first), x[..., :-1, :]], axis=-2)
    scores = jax.vmap(chunking.decayed_scores, in_axes=(0, 0, None))
    a_k, a_b, q_k, q_b = scores(jnp.stack([up, up, c.q, c.q]), jnp.stack([c.k, b, c.k, b]), c.g)
    a_k, a_b = down(a_k, 0), down(a_b, 0)
    since_start, to_end = (jnp.exp(x) for x in chunking.decay_sums(c.g))
    a_in, b_out = a * down(since_start, 1), b * to_end
    if call.segment_ids is not None:
        index, _ = chunking.segment_index(call.segment_ids)
        bounds = chunking.boundaries(index, c.k.shape[3], c.k.dtype)
        a_in, b_out = a_in * bounds.head[..., None], b_out * bounds.tail[..., None]
        a_k, a_b, q_k, q_b = (x * bounds.pairs for x in (a_k, a_b, q_k, q_b))
    return c, Moves(a_in, b_out, a_k, a_b, q_k, q_b)


def dplr(call: DPLRCall) -> Results:
    """See `plait.kernels.dplr`."""
    length = call.q.shape[1]
    if length == 1:
        return reference.dplr(call)
    c, m = cut(call)
    solved = chunking.solve_unit_lower(-m.a_b, jnp.concatenate([dot("...ij,...jv->...iv", m.a_k, c.v), m.a_in], axis=-1))
    of_values, of_state = jnp.split(solved, [c.v.shape[-1]], axis=-1)
    writes = dot("...ck,...cv->...kv", c.k_out, c.v)

    def advance(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        decay, write, b_out, of_values, of_state = chunk
        moved = of_values + dot("bhck,bhkv->bhcv", of_state, state)
        return decay[..., None] * state + write + dot("bhck,bhcv->bhkv", b_out, moved), (state, moved)

    shape = (*c.k.shape[:2], c.k.shape[-1], c.v.shape[-1])
    inputs = (c.decay, writes, m.b_out, of_values, of_state)
    (entering, moved), final_state = recurrence.scan_chunks(advance, inputs, call.initial_state, shape)
    o = dot("...ck,...kv->...cv", c.q_in, entering)
    o += dot("...ij,...jv->...iv", m.q_k, c.v) + dot("...ij,...jv->...iv", m.q_b, moved)
    stats = recurrence.chunk_stats(c, c.v, entering, final_state, call) if call.return_stats else None
    return chunking.heads_from_chunks(o, length).astype(call.q.dtype), final_state, stats
