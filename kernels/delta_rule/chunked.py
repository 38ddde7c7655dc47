"""The chunk form by the WY transform: what a chunk writes is one triangular inverse away from its keys and values."""

from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels import chunking, recurrence
from plait.kernels.chunking import dot
from plait.kernels.delta_rule import reference

Array = jax.Array


def cut(
    q: Array, k: Array, v: Array | None, g: Array | None, beta: Array, **options: Any
) -> tuple[recurrence.Chunks, Array, Array]:
    """The chunks, the scores of q [..., C, C], and M = (I + L)^-1 Diag(beta), L_ij being beta_i times the score of k_i, k_j."""
    g = recurrence.by_channel(jnp.zeros_like(beta) if g is None else g)
    c = recurrence.cut(q, k, v, g, beta[..., None], num_heads=beta.shape[2], **options)
    (beta,) = c.gates  # [B, H, N, C, 1]
    scores, lower = recurrence.scores(c.q, c), recurrence.scores(beta * c.k, c)
    inverse = chunking.unit_lower_inverse(jnp.tril(lower, -1))
    return c, scores, inverse * jnp.swapaxes(beta, -1, -2)


def delta_rule(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    beta: Array,
    *,
    scale: float,
    initial_state: Array | None,
    segment_ids: Array | None,
    chunk_size: int,
    return_stats: bool,
) -> recurrence.Results:
    """See `plait.kernels.delta_rule`."""
    if return_stats:
        chunk_size = min(chunk_size, recurrence.SPAN)
    options: dict[str, Any] = {"scale": scale, "segment_ids": segment_ids, "chunk_size": chunk_size}
    if q.shape[1] == 1:
        return reference.delta_rule(q, k, v, g, beta, initial_state=initial_state, return_stats=return_stats, **options)
    c, scores, inverse = cut(q, k, v, g, beta, **options)
    written = dot("...ij,...jv->...iv", inverse, c.v)  # U
    erased = dot("...ij,...jk->...ik", inverse, c.k_in)  # W

    def advance(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        decay, k_out, written, erased = chunk
        pseudo = written - dot("bhck,bhkv->bhcv", erased, state)
        return decay[..., None] * state + dot("bhck,bhcv->bhkv", k_out, pseudo), (state, pseudo)

    shape = (*c.k.shape[:2], c.k.shape[-1], c.v.shape[-1])
    (entering, pseudo), final_state = recurrence.scan_chunks(advance, (c.decay, c.k_out, written, erased), initial_state, shape)
    o = dot("...ck,...kv->...cv", c.q_in, entering) + dot("...ij,...jv->...iv", scores, pseudo)
    stats = recurrence.chunk_stats(c, pseudo, entering, final_state, segment_ids, q.shape[1]) if return_stats else None
    return recurrence.results(chunking.heads_from_chunks(o, q.shape[1]).astype(q.dtype), final_state, stats)
