"""The scan by chunks; what is N times as large as x exists of one chunk at a time, forward and backward."""

from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels import chunking
from plait.kernels.linear_scan.call import real_and_starts
from plait.kernels.linear_scan.chunked import scan
from plait.kernels.selective_scan import reference
from plait.kernels.selective_scan.call import SelectiveScanCall

Array = jax.Array


def selective_scan(call: SelectiveScanCall) -> tuple[Array, Array]:
    """See `plait.kernels.selective_scan`."""
    length = call.x.shape[1]
    if length == 1:
        return reference.selective_scan(call)
    size, A = chunking.fit_chunk_size(call.chunk_size, length), call.A.astype(call.dtype)
    real, starts = real_and_starts(call.segment_ids)
    steps = call.steps
    x = call.x.astype(call.dtype)
    written = steps * (x if real is None else jnp.where(real[..., None], x, 0))
    inputs = (steps, written, call.B, call.C, starts)

    @jax.checkpoint
    def advance(state: Array, chunk: tuple[Any, ...]) -> tuple[Array, Array]:
        steps, written, B, C, starts = chunk
        decay = jnp.exp(steps[:, :, None, :] * A[None, None])  # [B, c, N, D]
        decay = decay if starts is None else jnp.where(starts[..., None, None], 0, decay)
        written = written[:, :, None, :]
        if B is not None:
            written = B.astype(call.dtype)[..., None] * written
        s = scan(decay, jnp.broadcast_to(written, (*written.shape[:2], *A.shape)), state, size)
        return s[:, -1], call.read(s, None if C is None else C.astype(call.dtype))

    chunks = jax.tree.map(lambda y: jnp.moveaxis(chunking.to_chunks(y, size), 1, 0), inputs)
    final, y = jax.lax.scan(advance, call.start, chunks)
    y = jnp.moveaxis(y, 0, 1).reshape(call.x.shape[0], -1, call.x.shape[2])[:, :length]
    y = y if real is None else jnp.where(real[..., None], y, 0)
    return y.astype(call.x.dtype), final
