"""The chunk form in Hopper kernels."""

from typing import Any

import jax

from plait.kernels import recurrence
from plait.kernels.recurrence import gpu_driver

Array = jax.Array


def unsupported(q: Array, k: Array, v: Array, g: Array, *, scale: Any, return_stats: bool = False, **_: object) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    return gpu_driver.unsupported(q, k, v, scale=scale, return_stats=return_stats)


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
    """See `plait.kernels.decay`; a chunk is 64 tokens whatever `chunk_size` is."""
    return gpu_driver.run(
        q, k, v, g, scale=scale, initial_state=initial_state, segment_ids=segment_ids, return_stats=return_stats
    )
