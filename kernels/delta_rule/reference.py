"""The recurrence as written, one token after another."""

import jax
import jax.numpy as jnp

from plait.kernels.recurrence import Results, by_channel, scan_tokens

Array = jax.Array


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
) -> Results:
    """See `plait.kernels.delta_rule`; `chunk_size` means nothing here."""
    read = lambda state, x: jnp.einsum("bhkv,bhk->bhv", state, x, precision="highest")

    def step(state: Array, q: Array, k: Array, v: Array, *gates: Array) -> tuple[Array, Array, Array]:
        g, beta = gates
        state = jnp.exp(g)[..., None] * state
        written = beta[..., None] * (v - read(state, k))
        state = state + k[..., :, None] * written[..., None, :]
        return state, scale * read(state, q), written

    g = by_channel(jnp.zeros_like(beta) if g is None else g)
    return scan_tokens(step, q, k, v, g, beta, initial_state=initial_state, segment_ids=segment_ids, return_stats=return_stats)
