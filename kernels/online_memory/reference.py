"""One token after the other: the meaning of the op."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.chunking import dot
from plait.kernels.online_memory.call import MemoryCall
from plait.kernels.online_memory.rule import Rule, Weights, by_channel

Array = jax.Array


def online_memory(call: MemoryCall) -> tuple[Any, ...]:
    """See `plait.kernels.online_memory`."""
    return over_tokens(call, call.q.shape[1])


def over_tokens(call: MemoryCall, block: int) -> tuple[Any, ...]:
    """The scan over tokens; where `block` is less than T, what is kept for its gradient is a state every so many tokens."""
    borders, fresh = call.borders, call.fresh()
    length = call.q.shape[1]
    arrays = [None if x is None else jnp.moveaxis(x, 2, 0) for x in call.wide()]
    tokens = (*arrays, *(jnp.moveaxis(x, 1, 0) for x in borders[:3]))

    def one(carry: tuple[Weights, Weights, Weights], token: tuple[Any, ...]) -> tuple[Any, tuple[Array, Array]]:
        return _step(call.rule, fresh, carry, token)

    def some(carry: tuple[Weights, Weights, Weights], tokens: Any) -> Any:
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


def _step(rule: Rule, fresh: Weights, carry: tuple[Weights, Weights, Weights], token: tuple[Any, ...]) -> tuple[Any, Any]:
    (accumulated, speed, opened), (q, k, v, g, step, momentum, threshold, real, opens, restarts) = carry, token
    depth, row = len(fresh), lambda flag: flag[:, None, None, None]
    accumulated = tuple(jnp.where(row(restarts), w, a) for w, a in zip(fresh, accumulated, strict=True))
    speed = tuple(jnp.where(row(restarts), 0, s) for s in speed)
    opened = tuple(jnp.where(row(opens), a, old) for a, old in zip(accumulated, opened, strict=True))

    def answer(weights: Weights, x: Array) -> Array:
        return rule.apply(x, lambda layer, y: dot("bhi,bhio->bho", y, weights[layer]), depth)

    answered, back = jax.vjp(lambda weights: answer(weights, k), rule.weights(opened, opened))
    slopes = back(rule.pull(answered - v, threshold))[0]
    moved, written = [], jnp.zeros(real.shape[:1] + q.shape[1:2], q.dtype)
    for layer, (a, slope) in enumerate(zip(accumulated, slopes, strict=True)):
        move = -by_channel(step, layer, depth) * slope
        written = written + jnp.square(move).sum((-2, -1))
        if momentum is not None:
            move = jnp.exp(momentum)[..., None, None] * speed[layer] + move
        moved.append((by_channel(jnp.exp(g), layer, depth) * a + move, move))
    accumulated = tuple(jnp.where(row(real), new, a) for (new, _), a in zip(moved, accumulated, strict=True))
    speed = tuple(jnp.where(row(real), new, s) for (_, new), s in zip(moved, speed, strict=False))
    o = answer(rule.weights(accumulated, opened), q)
    return (accumulated, speed, opened), (o, jnp.where(real[:, None], jnp.sqrt(jnp.maximum(written, 1e-30)), 0))
