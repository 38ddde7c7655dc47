"""The recurrence as written, one token after another."""

import jax
import jax.numpy as jnp

from plait.kernels.linear_scan.call import LinearScanCall, real_and_starts
from plait.kernels.shapes import accumulation_dtype

Array = jax.Array


def linear_scan(call: LinearScanCall) -> tuple[Array, Array]:
    """See `plait.kernels.linear_scan`; `chunk_size` means nothing here."""
    x, g = (y.astype(accumulation_dtype(call.x)) for y in (call.x, call.g))
    real, starts = real_and_starts(call.segment_ids)
    real, starts = (jnp.full(x.shape[:2], y) if z is None else z for y, z in ((True, real), (False, starts)))

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        x, g, real, start = token
        state = jnp.where(start[:, None], 0, state)
        state = jnp.where(real[:, None], jnp.exp(g) * state + x, state)
        return state, jnp.where(real[:, None], state, 0)

    final, h = jax.lax.scan(step, call.start, jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), (x, g, real, starts)))
    return jnp.moveaxis(h, 0, 1).astype(call.x.dtype), final
