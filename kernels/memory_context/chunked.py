"""A segment at a time: its tokens read the memory, attend, and teach it together."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.chunking import dot, to_chunks
from plait.kernels.memory_context import reference
from plait.kernels.memory_context.call import ContextCall, attend, write
from plait.kernels.online_memory import chunked as memory
from plait.kernels.online_memory.reference import enter
from plait.kernels.short_conv import chunked as short_conv

Array = jax.Array
_BLOCK = 64
"""Tokens between kept states where every token is a segment of its own."""


def memory_context(call: ContextCall) -> tuple[Any, ...]:
    """See `plait.kernels.memory_context`."""
    length, rule = call.q.shape[1], call.rule
    if length == 1 or rule.chunk_size == 1:
        return reference.over_tokens(call, _BLOCK)
    size = min(rule.chunk_size, length)
    borders, fresh = call.borders, call.fresh()
    begun = jnp.where(borders.real, 1 + jnp.cumsum(borders.opens, axis=1, dtype=jnp.int32), 0)  # segments, 1 the one that enters
    ids = jnp.where(borders.real, 1 + jnp.cumsum(borders.restarts, axis=1, dtype=jnp.int32), 0)
    arrays = (call.reads, call.q, call.k, call.v, call.persistent_logits, call.positions, *borders[:3], begun, ids)
    spans = tuple(jnp.moveaxis(to_chunks(x, size), 1, 0) for x in arrays)

    def span(state: tuple[Any, ...], inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        carry, slots, filled, convs, entered = state
        reads, q, k, v, logits, positions, real, opens, restarts, begun, ids = inputs
        place = positions % rule.chunk_size
        new = (real & restarts & (jnp.cumsum(real, axis=1) == 1)).any(1)[:, None, None]
        convs = tuple(jnp.where(new, 0, before) for before in convs)

        def convolve(streams: tuple[Array, ...]) -> list[tuple[Array, Array]]:
            pairs = zip(streams, call.layers.taps(), convs, strict=True)
            return [short_conv.short_conv(reference.convolution(x, taps, before, ids)) for x, taps, before in pairs]

        def segment(number: Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
            carry, slots, filled, streams, y, o = state
            mine = begun == (entered + number)[:, None]
            begins = (mine & opens).any(1)
            carry = enter(fresh, carry, begins, (mine & restarts).any(1))
            weights, wide = rule.weights(carry[2], carry[2]), jnp.moveaxis(reads, 2, 1).astype(call.dtype)
            context = rule.apply(wide, lambda layer, x: dot("bhti,bhio->bhto", x, weights[layer]), len(weights))
            context = jnp.moveaxis(context, 1, 2).reshape(y.shape).astype(y.dtype)
            pairs = (k, v, *call.layers.keys_values(context, positions))
            slots, filled = write(slots, filled & ~begins[:, None], pairs, place, mine)
            here = mine[..., None]
            y = jnp.where(here, attend(call, q, logits, slots, filled, place), y)
            *new, g, step, momentum = call.layers.learned(y)
            streams = tuple(jnp.where(here, x, old) for x, old in zip(new, streams, strict=True))
            learned = (*call.layers.heads(*(x for x, _ in convolve(streams))), g[..., None], step[..., None], momentum)
            tokens = memory.Tokens(*(jnp.moveaxis(x, 2, 1).astype(call.dtype) for x in learned), None)  # type: ignore[call-arg]
            carry, (read, _) = memory.move(rule, carry, tokens, mine)
            return carry, slots, filled, streams, y, jnp.where(mine[:, None, :, None], read, o)

        def one(state: tuple[Any, ...], number: Array) -> tuple[Any, None]:
            some = (begun == (entered + number)[:, None]).any()
            return jax.lax.cond(some, segment, lambda _, state: state, number, state), None

        y = jnp.zeros((*real.shape, q.shape[2] * q.shape[3]), q.dtype)
        streams = tuple(jnp.zeros((*real.shape, before.shape[-1]), before.dtype) for before in convs)
        o = jnp.zeros(jnp.moveaxis(reads, 2, 1).shape, call.dtype)
        state, _ = jax.lax.scan(jax.checkpoint(one), (carry, slots, filled, streams, y, o), jnp.arange(size + 1, dtype=jnp.int32))
        carry, slots, filled, streams, y, o = state
        convs = tuple(last for _, last in convolve(streams))
        return (carry, slots, filled, convs, jnp.maximum(entered, begun.max(1))), (y, o)

    start = ((call.accumulated, call.speed, call.opened), call.slots, call.filled, call.convs, jnp.ones_like(call.chunk))
    (carry, slots, filled, convs, _), (y, o) = jax.lax.scan(jax.checkpoint(span), start, spans)
    y = jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, y.shape[3])[:, :length]
    o = jnp.moveaxis(o, (0, 3), (1, 2)).reshape(o.shape[1], -1, o.shape[2], o.shape[4])[:, :length]
    return y, o.astype(call.q.dtype), *carry, slots, filled, convs, borders.last
