"""The chunk form on TPU (Mosaic): see `tpu_chunk.decay_and_add`."""

from typing import Any

import jax

from plait.kernels.recurrence import Results, tpu_driver
from plait.kernels.recurrence.tpu_chunk import decay_and_add

Array = jax.Array


def unsupported(q: Array, k: Array, v: Array, *gates: Any, scale: Any, return_stats: bool = False, **_: object) -> str | None:
    """Why the kernel cannot serve a call, or None."""
    return tpu_driver.unsupported(q, k, v, scale=scale, return_stats=return_stats)


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
) -> Results:
    """See `plait.kernels.decay`; `chunk_size` means nothing here, `tpu_driver.Tiles` has the kernel's own."""
    return tpu_driver.recurrence(
        decay_and_add,
        q,
        k,
        v,
        (g,),
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        return_stats=return_stats,
    )
