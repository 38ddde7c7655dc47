"""The chunk form in Hopper kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels import recurrence, recurrence_gpu
from plait.kernels.recurrence_gpu import Prepared

Array = jax.Array


def unsupported(q: Array, k: Array, v: Array, g: Array, *, scale: Any, **_: object) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    return recurrence_gpu.unsupported(q, k, v, scale=scale)


def _prepare(segment_ids: Array | None, scale: float, q: Array, k: Array, v: Array, g: Array) -> Prepared:
    c = recurrence.cut(
        q, k, None, g[..., None], num_heads=v.shape[2], scale=scale, segment_ids=segment_ids, chunk_size=recurrence_gpu.CHUNK
    )
    scores = recurrence.scores(c.q, c)
    decay = jnp.broadcast_to(c.decay, (*c.decay.shape[:3], k.shape[-1]))
    return Prepared(*(x.astype(v.dtype) for x in (c.q_in, c.k_out)), decay, scores.astype(v.dtype), v)


def scalar_decay(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    *,
    scale: float,
    initial_state: Array | None,
    segment_ids: Array | None,
    chunk_size: int,
    return_stats: bool,
) -> recurrence.Results:
    """See `plait.kernels.scalar_decay`; a chunk is 64 tokens whatever `chunk_size` is."""
    return recurrence_gpu.run(
        _prepare, q, k, v, g, scale=scale, initial_state=initial_state, segment_ids=segment_ids, return_stats=return_stats
    )
