"""The short convolution on parts of sequences: each part's first taps are its neighbour's last tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from plait.kernels.context import ContextRule, Parts
from plait.kernels.short_conv.reference import first_id

Array = jax.Array


def _unsupported(count: int, x: Array, weight: Array, **_: object) -> str | None:
    reach = weight.shape[0] - 1
    return None if x.shape[1] // count >= reach else f"{x.shape[1] // count} tokens a device are fewer than {reach} taps back"


def _run(
    op: Callable[..., tuple[Array, Array]],
    parts: Parts,
    x: Array,
    weight: Array,
    *,
    initial_state: Array | None,
    segment_ids: Array | None,
    **options: object,
) -> tuple[Array, Array]:
    reach = weight.shape[0] - 1
    if reach == 0:
        return op(x, weight, initial_state=initial_state, segment_ids=segment_ids, **options)
    ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    near, near_ids = parts.before(x, reach), parts.before(ids, reach)
    near = jnp.where((near_ids == first_id(ids))[..., None], near, 0)
    start = jnp.zeros_like(near) if initial_state is None else initial_state.astype(x.dtype)
    near = jnp.where(parts.index == 0, start, near)
    y, last = op(x, weight, initial_state=near, segment_ids=segment_ids, **options)
    return y, parts.of_last(last, (ids != 0).any(1), start)


CONTEXT = ContextRule(_run, _unsupported)
