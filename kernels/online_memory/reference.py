"""One token after the other: the meaning of the op."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.chunking import dot
from plait.kernels.online_memory.call import MemoryCall
from plait.kernels.online_memory.rule import Rule, Weights, by_channel

Array = jax.Array
Carry = tuple[Weights, Weights, Weights]
"""What is accumulated, the momentum, and what was accumulated when the open chunk began."""


def online_memory(call: MemoryCall) -> tuple[Any, ...]:
    """See `plait.kernels.online_memory`."""
    return over_tokens(call, call.q.shape[1])


def over_tokens(call: MemoryCall, block: int) -> tuple[Any, ...]:
    """The scan over tokens; where `block` is less than T, what is kept for its gradient is a state every so many tokens."""
    borders, fresh = call.borders, call.fresh()
    length = call.q.shape[1]
    arrays = [None if x is None else jnp.moveaxis(x, 2, 0) for x in call.wide()]
    tokens = (*arrays, *(jnp.moveaxis(x, 1, 0) for x in borders[:3]))

    def one(carry: Carry, token: tuple[Any, ...]) -> tuple[Carry, tuple[Array, Array]]:
        *arrays, real, opens, restarts = token
        return move(call.rule, enter(fresh, carry, opens, restarts), tuple(arrays), real)

    def some(carry: Carry, tokens: Any) -> Any:
        return jax.lax.scan(one, carry, tokens)

    carry = (call.accumulated, call.speed, call.opened)
    if block >= length:
        carry, (o, written) = some(carry, tokens)
    else:
        cut = lambda x: jnp.pad(x, [(0, -length % block), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, block, *x.shape[1:])
        carry, results = jax.lax.scan(jax.checkpoint(some), carry, jax.tree.map(cut, tokens))
        o, written = (x.reshape(-1, *x.shape[2:])[:length] for x in results)
    o = jnp.where(borders.real[..., None, None], jnp.moveaxis(o, 0, 1), 0).astype(call.q.dtype)
    return o, *carry, borders.last, jnp.moveaxis(written, 0, 1)


def enter(fresh: Weights, carry: Carry, opens: Array, restarts: Array) -> Carry:
    """The state as a token finds it: new where a document begins, with a new chunk open where one `opens` `[B]`."""
    accumulated, speed, opened = carry
    row = lambda flag: flag[:, None, None, None]
    accumulated = tuple(jnp.where(row(restarts), w, a) for w, a in zip(fresh, accumulated, strict=True))
    speed = tuple(jnp.where(row(restarts), 0, s) for s in speed)
    return accumulated, speed, tuple(jnp.where(row(opens), a, old) for a, old in zip(accumulated, opened, strict=True))


def answer(rule: Rule, weights: Weights, x: Array) -> Array:
    """What a memory gives to x `[B, H, K]`."""
    return rule.apply(x, lambda layer, y: dot("bhi,bhio->bho", y, weights[layer]), len(weights))


def move(rule: Rule, carry: Carry, token: tuple[Any, ...], real: Array) -> tuple[Carry, tuple[Array, Array]]:
    """The state after a token, q, k, v, g, step, momentum and threshold, where it is `real` `[B]`; what it reads, and its write's norm."""
    (accumulated, speed, opened), (q, k, v, g, step, momentum, threshold) = carry, token
    depth, row = len(accumulated), real[:, None, None, None]
    answered, back = jax.vjp(lambda weights: answer(rule, weights, k), rule.weights(opened, opened))
    slopes = back(rule.pull(answered - v, threshold))[0]
    kept, moved, written = [], [], jnp.zeros(q.shape[:2], q.dtype)
    for layer, (a, slope) in enumerate(zip(accumulated, slopes, strict=True)):
        write = -by_channel(step, layer, depth) * slope
        written = written + jnp.square(write).sum((-2, -1))
        if momentum is not None:
            write = jnp.exp(momentum)[..., None, None] * speed[layer] + write
            moved.append(jnp.where(row, write, speed[layer]))
        kept.append(jnp.where(row, by_channel(jnp.exp(g), layer, depth) * a + write, a))
    o = answer(rule, rule.weights(tuple(kept), opened), q)
    written = jnp.where(real[:, None], jnp.sqrt(jnp.maximum(written, 1e-30)), 0)
    return (tuple(kept), tuple(moved), opened), (o, written)
