"""The chunk form: all gradients of a chunk at once, and the memory that each token reads as products within the chunk."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels.chunking import dot, to_chunks
from plait.kernels.online_memory import reference
from plait.kernels.online_memory.call import MemoryCall
from plait.kernels.online_memory.rule import Rule, by_channel

Array = jax.Array
_BLOCK = 64
"""Tokens between kept states where every token is a chunk of its own."""


class Tokens(NamedTuple):
    """Those of some chunk, head-major; see `MemoryCall.wide`."""

    q: Array
    k: Array
    v: Array
    g: Array
    step: Array
    momentum: Any
    threshold: Any


class Paths(NamedTuple):
    """How much of what enters, and of each token's gradient, is left at each token; a channel axis last, of 1 or K."""

    memory: Array
    """`[B, H, C, K or 1]`: of what was accumulated before."""
    speed: Any
    """`[B, H, C, K or 1]`: of the momentum from before, in what is accumulated; None without."""
    writes: Array
    """`[B, H, C, C, K or 1]`: of the gradient of token j in what token t reads."""
    last_speed: Any
    """`[B, H, 1]` and `[B, H, C, 1 or K]`: of the momentum from before and of each gradient, in that at the end; None without."""


def online_memory(call: MemoryCall) -> tuple[Any, ...]:
    """See `plait.kernels.online_memory`."""
    length, rule = call.q.shape[1], call.rule
    if length == 1 or rule.chunk_size == 1:
        return reference.over_tokens(call, _BLOCK)
    size = min(rule.chunk_size, length)
    borders, fresh = call.borders, call.fresh()
    begun = jnp.cumsum(borders.opens, axis=1, dtype=jnp.int32)

    def cut(x: Any, axis: int) -> Any:
        """`[..., T, ...]` to `[N, ..., C, ...]`, by spans of the row, in which chunks begin anywhere."""
        return None if x is None else jnp.moveaxis(jnp.moveaxis(to_chunks(jnp.moveaxis(x, axis, 1), size), 1, 0), 2, axis + 1)

    spans = (*(cut(x, 2) for x in call.wide()), *(cut(x, 1) for x in (*borders[:3], jnp.maximum(begun, 0))))

    def span(carry: tuple[Any, ...], inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        *state, entered = carry
        tokens, (real, opens, restarts, begun) = Tokens(*inputs[:7]), inputs[7:]
        begun = jnp.where(real, begun, -1)

        def chunk(number: Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
            mine = begun == (entered + number)[:, None]
            *before, o, written = state
            carry = reference.enter(fresh, tuple(before), (mine & opens).any(1), (mine & restarts).any(1))
            carry, (read, norms) = move(rule, carry, tokens, mine)
            return *carry, jnp.where(mine[:, None, :, None], read, o), jnp.where(mine[:, None], norms, written)

        def one(state: tuple[Any, ...], number: Array) -> tuple[Any, None]:
            some = (begun == (entered + number)[:, None]).any()
            return jax.lax.cond(some, chunk, lambda _, state: state, number, state), None

        zeros = (jnp.zeros_like(tokens.q), jnp.zeros(tokens.q.shape[:3], tokens.q.dtype))
        after, _ = jax.lax.scan(jax.checkpoint(one), (*state, *zeros), jnp.arange(size + 1, dtype=jnp.int32))
        *kept, o, written = after
        return (*kept, jnp.maximum(entered, begun.max(1))), (o, written)

    start = (call.accumulated, call.speed, call.opened, jnp.zeros(call.chunk.shape, jnp.int32))
    (*state, _), (o, written) = jax.lax.scan(jax.checkpoint(span), start, spans)
    o, written = (
        jnp.moveaxis(x, (0, 3), (1, 2)).reshape(x.shape[1], -1, x.shape[2], *x.shape[4:])[:, :length] for x in (o, written)
    )
    return o.astype(call.q.dtype), *state, borders.last, written


def move(rule: Rule, carry: reference.Carry, tokens: Tokens, mine: Array) -> tuple[reference.Carry, tuple[Array, Array]]:
    """The state after the tokens `mine` `[B, C]` of the open chunk; what these read, and their writes' norms."""
    accumulated, speed, opened = carry
    depth = len(accumulated)
    reads, slopes = rule.slopes(rule.weights(opened, opened), tokens.k, tokens.v, tokens.threshold)
    here = mine[:, None, :, None]
    paths = _paths(tokens, here)
    scales = rule.scales(opened)

    def product(layer: int, y: Array) -> Array:
        a, h, d = accumulated[layer], reads[layer], slopes[layer]
        inputs = layer == 0 and depth > 1 and paths.writes.shape[-1] > 1  # gates of the channels that the layer reads
        if rule.retention == "kl":
            hidden = "bhtji,bhji,bhjo->bhtio" if layer == 0 else "bhtjo,bhji,bhjo->bhtio"
            writes = jnp.broadcast_to(paths.writes, (*paths.writes.shape[:-1], (h if layer == 0 else d).shape[-1]))
            each = by_channel(paths.memory, layer, depth) * a[:, :, None] - dot(hidden, writes, h, d)
            return dot("bhti,bhtio->bhto", y, rule.weight(layer, each, scales[layer]))
        if inputs:
            scores = dot("bhti,bhtji,bhji->bhtj", y, paths.writes, h)
            z = dot("bhti,bhio->bhto", y * paths.memory, a) - dot("bhtj,bhjo->bhto", scores, d)
        else:
            scores = dot("bhti,bhji->bhtj", y, h)[..., None] * paths.writes
            kept = dot("bhti,bhio->bhto", y, a) * paths.memory
            subscripts = "bhtj,bhjo->bhto" if scores.shape[-1] == 1 else "bhtjo,bhjo->bhto"
            z = kept - dot(subscripts, scores[..., 0] if scores.shape[-1] == 1 else scores, d)
        if paths.speed is not None:
            z = z + dot("bhti,bhio->bhto", y, speed[layer]) * paths.speed
        return z * scales[layer]

    o = rule.apply(tokens.q, product, depth)
    norms, kept, moved = jnp.zeros(o.shape[:3], o.dtype), [], []
    for layer, (a, h, d) in enumerate(zip(accumulated, reads, slopes, strict=True)):
        first = layer == 0 and depth > 1
        weigh = lambda factor, h=h, d=d, first=first: dot("bhji,bhjo->bhio", *((factor * h, d) if first else (h, factor * d)))
        new = by_channel(paths.memory[:, :, -1], layer, depth) * a - weigh(paths.writes[:, :, -1])
        if paths.speed is not None:
            from_before, from_tokens = paths.last_speed
            new = new + paths.speed[:, :, -1][..., None] * speed[layer]
            moved.append(from_before[..., None] * speed[layer] - weigh(from_tokens))
        kept.append(new)
        one, other = (tokens.step * h, d) if first else (h, tokens.step * d)
        norms = norms + jnp.square(one).sum(-1) * jnp.square(other).sum(-1)
    return (tuple(kept), tuple(moved), opened), (o, jnp.sqrt(jnp.maximum(norms, 1e-30)))


def _paths(tokens: Tokens, here: Array) -> Paths:
    """The closed form of the recurrence over the tokens `here` `[B, 1, C, 1]`; others are passed over. Ratios of decays as differences of
    their logarithms, masked before they are exponentiated."""
    g = jnp.cumsum(jnp.where(here, tokens.g, 0), axis=2)
    step = jnp.where(here, tokens.step, 0)
    size = g.shape[2]
    earlier = jnp.tril(jnp.ones((size, size), bool))[..., None]

    def between(x: Array) -> Array:
        return jnp.exp(jnp.where(earlier, x[:, :, :, None] - x[:, :, None], -jnp.inf))

    kept = between(g) * here[:, :, None]  # what token i adds is kept at token t
    if tokens.momentum is None:
        return Paths(jnp.exp(g), None, kept * step[:, :, None], None)
    m = jnp.cumsum(jnp.where(here, tokens.momentum[..., None], 0), axis=2)
    carried = between(m)
    writes = dot("bhtic,bhij->bhtjc", kept, carried[..., 0]) * step[:, :, None]
    through = dot("bhtic,bhi->bhtc", kept, jnp.exp(m[..., 0]))
    return Paths(jnp.exp(g), through, writes, (jnp.exp(m[:, :, -1]), carried[:, :, -1] * step))
