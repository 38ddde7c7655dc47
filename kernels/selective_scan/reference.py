"""The recurrence as written, one token after another."""

from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.linear_scan.call import real_and_starts
from plait.kernels.selective_scan.call import SelectiveScanCall

Array = jax.Array


def selective_scan(call: SelectiveScanCall) -> tuple[Array, Array]:
    """See `plait.kernels.selective_scan`; `chunk_size` means nothing here."""
    x, A = call.x.astype(call.dtype), call.A.astype(call.dtype)
    B, C = (None if y is None else y.astype(call.dtype) for y in (call.B, call.C))
    real, starts = real_and_starts(call.segment_ids)
    real, starts = (jnp.full(x.shape[:2], y) if z is None else z for y, z in ((True, real), (False, starts)))

    def step(state: Array, token: tuple[Any, ...]) -> tuple[Array, Array]:
        x, dt, B, C, real, start = token
        state = jnp.where(start[:, None, None], 0, state)
        written = (dt * x)[:, None, :]
        written = written if B is None else B[:, :, None] * written
        new = jnp.exp(dt[:, None, :] * A[None]) * state + written
        state = jnp.where(real[:, None, None], new, state)
        return state, jnp.where(real[:, None], call.read(state, C), 0)

    tokens = jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), (x, call.steps, B, C, real, starts))
    final, y = jax.lax.scan(step, call.start, tokens)
    return jnp.moveaxis(y, 0, 1).astype(call.x.dtype), final
