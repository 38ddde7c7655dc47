"""One token after the other: the meaning of the op."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.memory_context.call import ContextCall, attend, write
from plait.kernels.online_memory import reference as memory
from plait.kernels.short_conv import reference as short_conv
from plait.kernels.short_conv.call import ShortConvCall

Array = jax.Array


def memory_context(call: ContextCall) -> tuple[Any, ...]:
    """See `plait.kernels.memory_context`."""
    return over_tokens(call, call.q.shape[1])


def over_tokens(call: ContextCall, block: int) -> tuple[Any, ...]:
    """The scan over tokens; where `block` is less than T, what is kept for its gradient is a state every so many tokens."""
    borders, fresh, size, length = call.borders, call.fresh(), call.rule.chunk_size, call.q.shape[1]
    arrays = (call.reads, call.q, call.k, call.v, call.persistent_logits, call.positions, *borders[:3])
    tokens = tuple(jnp.moveaxis(x, 1, 0)[:, :, None] for x in arrays)  # [T, B, 1, ...]

    def one(state: tuple[Any, ...], token: tuple[Any, ...]) -> tuple[Any, tuple[Array, Array]]:
        carry, slots, filled, convs = state
        reads, q, k, v, logits, positions, real, opens, restarts = token
        carry = memory.enter(fresh, carry, opens[:, 0], restarts[:, 0])
        context = memory.answer(call.rule, call.rule.weights(carry[2], carry[2]), reads[:, 0].astype(call.dtype))
        context = context.reshape(len(q), 1, -1).astype(q.dtype)
        new = (k, v, *call.layers.keys_values(context, positions))
        slots, filled = write(slots, filled & ~opens, new, positions % size, real)
        y = attend(call, q, logits, slots, filled, positions % size)
        *streams, g, step, momentum = call.layers.learned(y)
        convolved, after = [], []
        for stream, taps, before in zip(streams, call.layers.taps(), convs, strict=True):
            entering = jnp.where(restarts[..., None], 0, before)
            done, last = short_conv.short_conv(convolution(stream, taps, entering, real.astype(jnp.int32)))
            convolved.append(done)
            after.append(last)
        learned = (*call.layers.heads(*convolved), g[..., None], step[..., None], momentum)
        arrays = tuple(x[:, 0].astype(call.dtype) for x in learned)
        carry, (o, _) = memory.move(call.rule, carry, (*arrays, None), real[:, 0])
        return (carry, slots, filled, tuple(after)), (y[:, 0], o)

    def some(state: tuple[Any, ...], tokens: Any) -> Any:
        return jax.lax.scan(one, state, tokens)

    state = ((call.accumulated, call.speed, call.opened), call.slots, call.filled, call.convs)
    if block >= length:
        state, (y, o) = some(state, tokens)
    else:
        cut = lambda x: jnp.pad(x, [(0, -length % block), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, block, *x.shape[1:])
        state, results = jax.lax.scan(jax.checkpoint(some), state, jax.tree.map(cut, tokens))
        y, o = (x.reshape(-1, *x.shape[2:])[:length] for x in results)
    carry, *rest = state
    o = jnp.where(borders.real[..., None, None], jnp.moveaxis(o, 0, 1), 0).astype(call.q.dtype)
    return jnp.moveaxis(y, 0, 1), o, *carry, *rest, borders.last


def convolution(x: Array, taps: Array, before: Array, segment_ids: Array) -> ShortConvCall:
    """That of one of the memory's streams."""
    return ShortConvCall(
        x=x, weight=taps.astype(x.dtype), bias=None, initial_state=before, segment_ids=segment_ids, activation="silu"
    )
