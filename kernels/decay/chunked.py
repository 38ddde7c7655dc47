"""The chunk form: products inside a chunk, one state passed between chunks."""

from typing import Any

import jax

from plait.kernels import chunking, recurrence
from plait.kernels.decay import reference

Array = jax.Array


def decay(
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
    """See `plait.kernels.decay`."""
    if return_stats:
        chunk_size = min(chunk_size, recurrence.SPAN)
    options: dict[str, Any] = {"scale": scale, "segment_ids": segment_ids, "chunk_size": chunk_size}
    if q.shape[1] == 1:
        return reference.decay(q, k, v, g, initial_state=initial_state, return_stats=return_stats, **options)
    chunks = recurrence.cut(q, k, v, recurrence.by_channel(g), num_heads=v.shape[2], **options)
    o, final_state, entering = recurrence.decayed_attention(chunks, initial_state=initial_state)
    stats = None
    if return_stats:
        stats = recurrence.chunk_stats(chunks, chunks.v, entering, final_state, segment_ids, q.shape[1])
    return recurrence.results(chunking.heads_from_chunks(o, q.shape[1]).astype(q.dtype), final_state, stats)
