"""The short convolution on parts of sequences: each part's first taps are its neighbour's last tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from plait.kernels.context import ContextRule, Parts
from plait.kernels.short_conv.call import ShortConvCall
from plait.kernels.short_conv.reference import first_id

Array = jax.Array


def _unsupported(count: int, call: ShortConvCall) -> str | None:
    length = call.x.shape[1] // count
    return None if length >= call.reach else f"{length} tokens a device are fewer than {call.reach} taps back"


def _run(op: Callable[[ShortConvCall], tuple[Array, Array]], parts: Parts, call: ShortConvCall) -> tuple[Array, Array]:
    x, reach = call.x, call.reach
    if reach == 0:
        return op(call)
    ids = jnp.ones(x.shape[:2], jnp.int32) if call.segment_ids is None else call.segment_ids
    near, near_ids = parts.before(x, reach), parts.before(ids, reach)
    near = jnp.where((near_ids == first_id(ids))[..., None], near, 0)
    start = call.before
    y, last = op(call.replace(initial_state=jnp.where(parts.index == 0, start, near)))
    return y, parts.of_last(last, (ids != 0).any(1), start)


CONTEXT = ContextRule(_run, _unsupported)
