"""The chunk form by the WY transform: what a chunk writes is one triangular inverse away from its keys and values."""

import jax
import jax.numpy as jnp

from plait.kernels import chunking, recurrence
from plait.kernels.chunking import dot
from plait.kernels.delta_rule import reference
from plait.kernels.recurrence import Chunks, RecurrenceCall, Results

Array = jax.Array


def cut(call: RecurrenceCall) -> tuple[Chunks, Array, Array, Array]:
    """The chunks, the scores of q [..., C, C], L with L_ij beta_i times the score of k_i, k_j for j < i, and beta [..., C, 1]."""
    c = recurrence.cut(call)
    (beta,) = c.gates  # [B, H, N, C, 1]
    scores, lower = recurrence.scores(c.q, c), recurrence.scores(beta * c.k, c)
    return c, scores, jnp.tril(lower, -1), beta


def delta_rule(call: RecurrenceCall) -> Results:
    """See `plait.kernels.delta_rule`."""
    call, length = call.normalized(), call.q.shape[1]
    if length == 1:
        return reference.delta_rule(call)
    c, scores, lower, beta = cut(call)
    solved = chunking.solve_unit_lower(lower, beta * jnp.concatenate([c.v, c.k_in], axis=-1))
    written, erased = jnp.split(solved, [c.v.shape[-1]], axis=-1)  # U and W

    def advance(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        decay, k_out, written, erased = chunk
        pseudo = written - dot("bhck,bhkv->bhcv", erased, state)
        return decay[..., None] * state + dot("bhck,bhcv->bhkv", k_out, pseudo), (state, pseudo)

    shape = (*c.k.shape[:2], c.k.shape[-1], c.v.shape[-1])
    (entering, pseudo), final_state = recurrence.scan_chunks(
        advance, (c.decay, c.k_out, written, erased), call.initial_state, shape
    )
    o = dot("...ck,...kv->...cv", c.q_in, entering) + dot("...ij,...jv->...iv", scores, pseudo)
    stats = recurrence.chunk_stats(c, pseudo, entering, final_state, call) if call.return_stats else None
    return chunking.heads_from_chunks(o, length).astype(call.q.dtype), final_state, stats
