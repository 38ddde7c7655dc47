"""The recurrence as written, one token after another."""

import jax
import jax.numpy as jnp

from plait.kernels.recurrence import Results, by_channel, scan_tokens

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
) -> Results:
    """See `plait.kernels.decay`; `chunk_size` means nothing here."""

    def step(state: Array, q: Array, k: Array, v: Array, g: Array) -> tuple[Array, Array, Array]:
        state = jnp.exp(g)[..., None] * state + k[..., :, None] * v[..., None, :]
        return state, scale * jnp.einsum("bhkv,bhk->bhv", state, q, precision="highest"), v

    return scan_tokens(
        step, q, k, v, by_channel(g), initial_state=initial_state, segment_ids=segment_ids, return_stats=return_stats
    )
