"""The math of one chunk of a linear recurrence in operations that Mosaic lowers: products, elementwise, reductions, iota masks.

Everything is two-dimensional and float32: a chunk of C tokens is [C, K] or [C, V], a number a token is a row [1, C] or a column
[C, 1]. The state is kept transposed, [V, K], so that the decay of a key channel is a row. As in `chunking`, no exponent is
positive and no sum is a difference of longer ones. Everything can be differentiated inside a kernel: `product`, `count`, `roll` and
`solve` bring backward parts of the same kind.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array
Kind = Literal["nn", "nt", "tn"]
"""Which operands of a product are transposed."""

Parts = tuple[int, int, int] | None
"""Into how many bfloat16 numbers the matrix unit gets each number of the two operands and of the cotangent: one rounds, two keep 16
bits, three all; None are float32 products."""

SUBLANES = 8

_DIMS = {"nn": (((1,), (0,)), ((), ())), "nt": (((1,), (1,)), ((), ())), "tn": (((0,), (0,)), ((), ()))}


def _split(x: Array, parts: int) -> list[Array]:
    """x as a sum of bfloat16 arrays: its leading bits, then the next ones, the last rounded."""
    out = []
    for _ in range(parts - 1):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & -(1 << 16)
        high = jax.lax.bitcast_convert_type(bits, jnp.float32)
        out.append(high.astype(jnp.bfloat16))
        x = x - high
    return [*out, x.astype(jnp.bfloat16)]


def _dot(kind: Kind, a: Array, b: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, _DIMS[kind], precision=precision, preferred_element_type=jnp.float32)


def _product(kind: Kind, parts: tuple[int, int] | None, a: Array, b: Array) -> Array:
    if parts is None:
        return _dot(kind, a, b)
    lefts, rights = _split(a, parts[0]), _split(b, parts[1])
    pairs = [(x, y) for i, x in enumerate(lefts) for j, y in enumerate(rights) if i + j < max(parts)]
    first, *rest = [_dot(kind, x, y) for x, y in pairs]
    return sum(rest, start=first)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(kind: Kind, parts: Parts, a: Array, b: Array) -> Array:
    """A matrix product of float32 arrays in float32, transposed as `kind` says, also when differentiated."""
    return _product(kind, parts and parts[:2], a, b)


def _product_backward(kind: Kind, parts: Parts, saved: tuple[Array, Array], ct: Array) -> tuple[Array, Array]:
    a, b = saved
    pull = lambda kind, x, i, y, j: _product(kind, None if parts is None else (i, j), x, y)
    i, j, own = parts or (0, 0, 0)
    if kind == "nn":
        return pull("nt", ct, own, b, j), pull("tn", a, i, ct, own)
    if kind == "nt":
        return pull("nn", ct, own, b, j), pull("tn", ct, own, a, i)
    return pull("nt", b, j, ct, own), pull("nn", a, i, ct, own)


product.defvjp(lambda kind, parts, a, b: (product(kind, parts, a, b), (a, b)), _product_backward)


def _count(kind: Kind, x: Array, weights: Array) -> Array:
    weights = weights.astype(jnp.bfloat16)
    first, *rest = [_dot(kind, part, weights) for part in _split(x, 3)]
    return sum(rest, start=first)


@jax.custom_vjp
def count(x: Array, weights: Array) -> Array:
    """x @ weights for weights that are 0 or 1: three 16-bit passes give all of float32."""
    return _count("nn", x, weights)


count.defvjp(lambda x, weights: (_count("nn", x, weights), weights), lambda weights, ct: (_count("nt", ct, weights), None))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def roll(x: Array, shift: int) -> Array:
    """Row i of x [C, K] to row i + shift, around the end; 0 < shift < C."""
    return pltpu.roll(x, shift, 0)


roll.defvjp(lambda x, shift: (roll(x, shift), None), lambda shift, _, ct: (pltpu.roll(ct, ct.shape[0] - shift, 0),))


def iota(shape: tuple[int, ...], axis: int) -> Array:
    """int32 indices along an axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _square(size: int) -> tuple[Array, Array]:
    return iota((size, size), 0), iota((size, size), 1)


def column(row: Array) -> Array:
    """[1, C] to [C, 1]."""
    i, j = _square(row.shape[1])
    return jnp.sum(jnp.where(i == j, row, 0.0), axis=1, keepdims=True)


class Bounds(NamedTuple):
    """Who sees whom across segment boundaries, as 0/1 factors; see `chunking.Boundaries`."""

    pairs: Array
    """[C, C]"""
    head: Array
    """[C, 1]"""
    tail: Array
    """[C, 1]"""
    through: Array
    """[1, 1]"""

    @classmethod
    def of(cls, number: Array, entering: Array) -> "Bounds":
        """From the segment number of every token and that of the token before the chunk, repeated, both float32 rows [1, C]."""
        same = lambda a, b: jnp.where(a == b, 1.0, 0.0)
        numbers, first, last = column(number), entering[:, :1], number[:, -1:]
        return cls(same(numbers, number), same(numbers, first), same(numbers, last), same(first, last))


class Chunk(NamedTuple):
    """What a chunk does with the state; `since`, `to_end` and `decay` are 0 across segment boundaries."""

    scores: tuple[Array, ...]
    """Decayed products of queries with the keys up to them, [C, C] each."""
    since: Array
    """[C, K or 1]: what is left at a token of the entering state."""
    to_end: Array
    """[C, K or 1]: what is left at the chunk's end of a token's write."""
    decay: Array
    """[1, K or 1]: what is left at the chunk's end of the entering state."""


def cut(queries: tuple[Array, ...], k: Array, gs: Sequence[Array | None], bounds: Bounds | None, parts: Parts) -> list[Chunk]:
    """Scores of several sets of queries [C, K] with the keys [C, K], for each of the decays of a key head's value heads.

    A decay is a row [1, C], [C, K], or None; value heads that decay all channels alike share the products of queries and keys.
    """
    if gs[0] is not None and gs[0].shape[0] != 1:
        cuts = [_by_channel(queries, k, g, parts) for g in gs if g is not None]
    else:
        products = tuple(product("nt", parts, q, k) for q in queries)
        cuts = [_by_head(products, g) for g in gs]
    if bounds is None:
        return cuts
    return [
        Chunk(tuple(x * bounds.pairs for x in c.scores), c.since * bounds.head, c.to_end * bounds.tail, c.decay * bounds.through)
        for c in cuts
    ]


def _by_head(products: tuple[Array, ...], g: Array | None) -> Chunk:
    size = products[0].shape[0]
    i, j = _square(size)
    if g is None:
        one = jnp.ones((size, 1), jnp.float32)
        between = jnp.where(j <= i, 1.0, 0.0)
        since, to_end, decay = one, one, one[:1]
    else:
        up_to = jnp.where(j <= i, g, 0.0)
        between = jnp.where(j <= i, jnp.exp(count(up_to, jnp.where(i > j, 1.0, 0.0))), 0.0)
        since = jnp.exp(jnp.sum(up_to, axis=1, keepdims=True))
        to_end = jnp.exp(jnp.sum(jnp.where(j > i, g, 0.0), axis=1, keepdims=True))
        decay = jnp.exp(jnp.sum(g, axis=1, keepdims=True))
    return Chunk(tuple(x * between for x in products), since, to_end, decay)


def _by_channel(queries: tuple[Array, ...], k: Array, g: Array, parts: Parts) -> Chunk:
    """`chunking.decayed_scores`: tokens halve into runs; late ones decay since their run's start, early ones to its end.

    At each level one array holds both decays, the late runs' and the early runs', and a mask keeps the products of the two.
    """
    size = k.shape[0]
    i, j = _square(size)
    token = iota(g.shape, 0)
    scores = [jnp.where(i == j, jnp.sum(q * k, axis=1, keepdims=True), 0.0) for q in queries]
    prefix, suffix = g, jnp.zeros_like(g)
    for level in range((size - 1).bit_length()):
        run = 1 << level
        late = (token & run) != 0
        decay = jnp.exp(jnp.where(late, prefix, suffix))
        early_keys = k * decay
        pairs = jnp.where(((i & run) != 0) & ((i >> level) == (j >> level) + 1), 1.0, 0.0)
        for n, q in enumerate(queries):
            scores[n] += pairs * product("nt", parts, q * decay, early_keys)
        total = prefix + suffix
        other = jnp.where(late, roll(total, run), roll(total, size - run))
        prefix, suffix = prefix + jnp.where(late, other, 0.0), suffix + jnp.where(late, 0.0, other)
    return Chunk(tuple(scores), jnp.exp(prefix), jnp.exp(suffix), jnp.exp(jnp.sum(g, axis=0, keepdims=True)))


def unit_lower_inverses(lowers: Sequence[Array], full: bool) -> list[Array]:
    """The inverses of I + L for strictly lower triangular L [C, C], by halving, as stable as substitution.

    Diagonal blocks of b tokens lie side by side as [b, C]: then (-bottom^-1 left top^-1) of all pairs is two products of b rows.
    Several matrices go through the levels together, since each waits for the one before. Where keys resemble each other the products
    are sums of large terms of both signs: they are float32 products, or without `full` of three bfloat16 numbers an operand.
    """
    size = lowers[0].shape[0]
    i, j = _square(size)
    dot = partial(_product, "nn", None if full else (3, 3))

    def spread(x: Array) -> Array:  # the block-diagonal matrix of blocks side by side
        height = x.shape[0]
        return jnp.where(i & -height == j & -height, jnp.concatenate([x] * (size // height), axis=0), 0.0)

    height = min(SUBLANES, size)
    r, c = iota((height, size), 0), iota((height, size), 1)
    inverses = [jnp.where(r == c & (height - 1), 1.0, 0.0)] * len(lowers)
    for level in range((size - 1).bit_length()):
        left = ((i >> level) == (j >> level) + 1) & ((i >> level) & 1 != 0)
        corrections = [dot(x, jnp.where(left, lower, 0.0)) for x, lower in zip(inverses, lowers, strict=True)]
        if level:
            corrections = [dot(y, spread(x)) for x, y in zip(inverses, corrections, strict=True)]
        for n, (x, y) in enumerate(zip(inverses, corrections, strict=True)):
            if 1 << level < height:
                inverses[n] = x - y
            else:
                odd = (iota(x.shape, 1) >> level) & 1 != 0
                inverses[n] = jnp.concatenate([jnp.where(odd, 0.0, x), jnp.where(odd, x, -y)], axis=0)
    return inverses


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def solve(parts: Parts, lower: Array, inverse: Array, right: Array) -> Array:
    """X with (I + L) X = `right` [C, V], given the inverse, a constant to differentiation; `parts` are of inverse, right and ct."""
    return _product("nn", parts and parts[:2], inverse, right)


def _solve_forward(parts: Parts, lower: Array, inverse: Array, right: Array) -> tuple[Array, tuple[Array, Array]]:
    x = solve(parts, lower, inverse, right)
    return x, (inverse, x)


def _solve_backward(parts: Parts, saved: tuple[Array, Array], ct: Array) -> tuple[Array, None, Array]:
    inverse, x = saved
    i, j, own = parts or (0, 0, 0)
    row, col = _square(inverse.shape[0])
    d_right = _product("tn", parts and (i, own), inverse, ct)
    d_lower = jnp.where(col < row, -_product("nt", parts and (own, j), d_right, x), 0.0)
    return d_lower, None, d_right


solve.defvjp(_solve_forward, _solve_backward)


class ValueHead(NamedTuple):
    """One chunk's arguments of one value head, float32."""

    v: Array
    """[C, V]"""
    gates: tuple[Any, ...]
    """Rows [1, C] or [C, K], or None."""


class Inputs(NamedTuple):
    """One chunk's arguments of one key head, float32."""

    q: Array
    """[C, K]"""
    k: Array
    """[C, K]"""
    heads: tuple[ValueHead, ...]
    """The value heads that read with these queries and keys."""


class Written(NamedTuple):
    """What a chunk gives for one value head."""

    o: Array
    """[C, V], not scaled."""
    values: Array
    """[C, V], what was written under the keys: v, or the pseudo values of the delta rule."""
    state: Array
    """[V, K], leaving."""


BlockFunction = Callable[[bool, list[list[Inputs]], list[Bounds | None], list[Array]], list[list[Written]]]
"""(full, each key head's chunks in order, the chunks' bounds, the state [V, K] that enters the first chunk of each value head) to what
each chunk of each value head gives.

`full` asks for float32 products; without it operands are rounded to bfloat16 where that costs no more than rounding the inputs. Heads
do not depend on each other: what waits for the chunk before is written for all of them in turn, so that they fill each other's waits.
"""

_Head = list[tuple[Inputs, ValueHead, Chunk]]
"""The chunks of one value head."""


def _cut_heads(
    queries: Callable[[Inputs], tuple[Array, ...]], parts: Parts, keys: list[list[Inputs]], bounds: list[Bounds | None]
) -> list[_Head]:
    """The value heads of all key heads, cut."""
    heads: list[_Head] = []
    for chunks in keys:
        cuts = [cut(queries(x), x.k, [y.gates[0] for y in x.heads], b, parts) for x, b in zip(chunks, bounds, strict=True)]
        heads += [[(x, x.heads[m], c[m]) for x, c in zip(chunks, cuts, strict=True)] for m in range(len(chunks[0].heads))]
    return heads


def decay_and_add(full: bool, keys: list[list[Inputs]], bounds: list[Bounds | None], states: list[Array]) -> list[list[Written]]:
    """Scalar or vector decay: the `BlockFunction` of gates (g,)."""
    parts: Parts = None if full else (1, 1, 1)
    written = []
    for head, state in zip(_cut_heads(lambda x: (x.q,), parts, keys, bounds), states, strict=True):
        writes = [product("tn", parts, y.v, x.k * c.to_end) for x, y, c in head]
        passed = [state]
        for (_, _, c), write in zip(head, writes, strict=True):
            passed.append(c.decay * passed[-1] + write)
        o = [
            product("nt", parts, x.q * c.since, entering) + product("nn", parts, c.scores[0], y.v)
            for (x, y, c), entering in zip(head, passed, strict=False)
        ]
        written.append([Written(*each) for each in zip(o, (y.v for _, y, _ in head), passed[1:], strict=True)])
    return written


def erase_and_write(
    full: bool, keys: list[list[Inputs]], bounds: list[Bounds | None], states: list[Array]
) -> list[list[Written]]:
    """The delta rule: the `BlockFunction` of gates (g, beta) with beta a row, g perhaps None.

    The pseudo values X solve (I + L) X = Diag(beta) (V - (exp(P) * K) S) (see delta_rule/README.md). They nearly cancel each other in
    sums over tokens, and without decay nothing fades a rounding of the state: what such sums take and what goes from state to state is
    kept at 16 bits. q, k and v have no more than 8, so a decay that all channels share is multiplied after the products.
    """
    first = keys[0][0]
    g = first.heads[0].gates[0]
    by_channel = g is not None and g.shape[0] != 1
    of = lambda *parts: None if full else parts
    i, j = _square(first.k.shape[0])
    heads = _cut_heads(lambda x: (x.q, x.k), of(2, 2, 2) if by_channel else of(1, 1, 2), keys, bounds)
    lowers = [[jnp.where(j < i, column(y.gates[1]) * c.scores[1], 0.0) for _, y, c in head] for head in heads]
    inverses = iter(unit_lower_inverses([jax.lax.stop_gradient(x) for row in lowers for x in row], full))
    inverse = [[next(inverses) for _ in row] for row in lowers]
    passed: list[list[Array]] = [[state] for state in states]
    values: list[list[Array]] = [[] for _ in heads]
    for n, chunk in enumerate(zip(*heads, strict=True)):
        found = [
            product("nt", of(2, 2, 2), x.k * c.since, to[n]) if by_channel else c.since * product("nt", of(1, 2, 2), x.k, to[n])
            for (x, _, c), to in zip(chunk, passed, strict=True)
        ]
        for h, (_, y, _) in enumerate(chunk):
            values[h].append(solve(of(3, 2, 2), lowers[h][n], inverse[h][n], column(y.gates[1]) * (y.v - found[h])))
        for (x, _, c), to, value in zip(chunk, passed, values, strict=True):
            if by_channel:
                write = product("tn", of(2, 2, 2), value[n], x.k * c.to_end)
            else:
                write = product("tn", of(2, 1, 2), c.to_end * value[n], x.k)
            to.append(c.decay * to[n] + write)
    written = []
    for head, to, value in zip(heads, passed, values, strict=True):
        o = [
            product("nt", of(1, 1, 1), x.q * c.since, to[n]) + product("nn", of(2, 2, 1), c.scores[0], value[n])
            for n, (x, _, c) in enumerate(head)
        ]
        written.append([Written(*each) for each in zip(o, value, to[1:], strict=True)])
    return written
