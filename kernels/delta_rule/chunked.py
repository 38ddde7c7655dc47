"""The chunk form by the WY transform: what a chunk writes is one triangular inverse away from its keys and values."""

import jax
import jax.numpy as jnp

from plait.kernels import chunking, recurrence
from plait.kernels.chunking import dot
from plait.kernels.delta_rule import reference
from plait.kernels.recurrence import Chunks, RecurrenceCall, Results

Array = jax.Array


def cut(call: RecurrenceCall) -> tuple[Chunks, Array, Array]:
    """The chunks, the scores of q [..., C, C], and M = (I + L)^-1 Diag(beta), L_ij being beta_i times the score of k_i, k_j."""
    c = recurrence.cut(call)
    (beta,) = c.gates  # [B, H, N, C, 1]
    scores, lower = recurrence.scores(c.q, c), recurrence.scores(beta * c.k, c)
    inverse = chunking.unit_lower_inverse(jnp.tril(lower, -1))
    return c, scores, inverse * jnp.swapaxes(beta, -1, -2)


def delta_rule(call: RecurrenceCall) -> Results:
    """See `plait.kernels.delta_rule`."""
    length = call.q.shape[1]
    if length == 1:
        return reference.delta_rule(call)
    c, scores, inverse = cut(call)
    written = dot("...ij,...jv->...iv", inverse, c.v)  # U
    erased = dot("...ij,...jk->...ik", inverse, c.k_in)  # W

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
