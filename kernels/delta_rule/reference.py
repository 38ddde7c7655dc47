"""The recurrence as written, one token after another."""

import jax
import jax.numpy as jnp

from plait.kernels.recurrence import RecurrenceCall, Results, scan_tokens

Array = jax.Array


def delta_rule(call: RecurrenceCall) -> Results:
    """See `plait.kernels.delta_rule`; `chunk_size` means nothing here."""
    call = call.normalized()
    read = lambda state, x: jnp.einsum("bhkv,bhk->bhv", state, x, precision="highest")

    def step(state: Array, q: Array, k: Array, v: Array, g: Array, beta: Array) -> tuple[Array, Array, Array]:
        state = jnp.exp(g)[..., None] * state
        written = beta[..., None] * (v - read(state, k))
        state = state + k[..., :, None] * written[..., None, :]
        return state, call.scale * read(state, q), written

    return scan_tokens(step, call)
