"""The chunk form by the WY transform in Hopper kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels import recurrence, recurrence_gpu
from plait.kernels.chunking import dot
from plait.kernels.delta_rule import chunked
from plait.kernels.recurrence_gpu import Prepared

Array = jax.Array


def unsupported(q: Array, k: Array, v: Array, g: Array | None, beta: Array, *, scale: Any, **_: object) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    return recurrence_gpu.unsupported(q, k, v, scale=scale)


def _prepare(segment_ids: Array | None, scale: float, q: Array, k: Array, v: Array, g: Array | None, beta: Array) -> Prepared:
    c, scores, inverse = chunked.cut(q, k, v, g, beta, scale=scale, segment_ids=segment_ids, chunk_size=recurrence_gpu.CHUNK)
    written = dot("...ij,...jv->...iv", inverse, c.v)
    erased = dot("...ij,...jk->...ik", inverse, c.k_in)
    decay = jnp.broadcast_to(c.decay, (*c.decay.shape[:3], k.shape[-1]))
    q_in, k_out, scores, written, erase = (x.astype(v.dtype) for x in (c.q_in, c.k_out, scores, written, -erased))
    return Prepared(q_in, k_out, decay, scores, written, erase)


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
    """See `plait.kernels.delta_rule`; a chunk is 64 tokens whatever `chunk_size` is."""
    return recurrence_gpu.run(
        _prepare, q, k, v, g, beta, scale=scale, initial_state=initial_state, segment_ids=segment_ids, return_stats=return_stats
    )
