"""The recurrence as written, one token after another."""

import jax
import jax.numpy as jnp

from plait.kernels.recurrence import RecurrenceCall, Results, scan_tokens

Array = jax.Array


def decay(call: RecurrenceCall) -> Results:
    """See `plait.kernels.decay`; `chunk_size` means nothing here."""

    def step(state: Array, q: Array, k: Array, v: Array, g: Array) -> tuple[Array, Array, Array]:
        state = jnp.exp(g)[..., None] * state + k[..., :, None] * v[..., None, :]
        return state, call.scale * jnp.einsum("bhkv,bhk->bhv", state, q, precision="highest"), v

    return scan_tokens(step, call)
