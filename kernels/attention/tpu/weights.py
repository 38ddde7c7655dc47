"""What the TPU kernels of attention make of some keys and some queries: weights, sums of them and gradients, kept keys by queries [N, M]."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels.attention.reference import MASKED as HIDDEN
from plait.kernels.attention.tpu.edges import CELL, PARTLY, WHOLLY, Band, Cells
from plait.kernels.attention.tpu.tiling import SUBLANES, Problem, cuts
from plait.kernels.shapes import matmul_precision

Array = jax.Array

LOG2_E = 1.4426950408889634
_NOTHING = HIDDEN / 2
"""The largest logit of a row that has seen no key yet: hidden ones lie so far below it that their weights are 0."""

Sees = Array | bool | None
"""Which of some keys a query sees, bool [N or 1, M]; None is all, False is none."""

Visible = Callable[[slice], Sequence[tuple[slice, Sees]]]
"""Of some keys, no more than CELL from a multiple of it on, by runs of queries: which of them a query sees."""

Chosen = Sequence[Array] | None
"""Of each of equal shares of some keys, which queries see any of them, bool [1, M]; None is all."""

CHUNK = 32
"""Keys whose weights are made together."""

ONES = 16
"""Rows of ones below the values, where a product adds the weights up: those of a register of 16-bit numbers."""

NT, NN = ((((a,), (b,)), ((), ())) for a, b in ((1, 1), (1, 0)))


def dot(a: Array, b: Array, dims: Any) -> Array:
    """A product of two tiles in float32; 16-bit operands are exact in it, float32 ones get full precision."""
    return jax.lax.dot_general(a, b, dims, precision=matmul_precision(a.dtype), preferred_element_type=jnp.float32)


def products(problem: Problem, k: Array, q: Array, dims: Any = NT) -> Array:
    """The logits [N, M] in the problem's unit: k . q, with a soft cap the hyperbolic tangent, of which no digit may go near 1. The queries are
    rows [M, K], or with NN columns [K, M]."""
    z = dot(k, q, dims)
    return z if problem.soft_cap is None else jnp.tanh(z * (problem.scale / problem.soft_cap))


def seen(problem: Problem, queries: Array, keys: Array) -> Array:
    """bool [N, M]: which keys the mask shows a query, from segments and positions of queries [2, M] and of keys [N, 2]."""
    ids = jnp.where(keys[:, 0:1] == 0, -1, keys[:, 0:1])  # padding is nobody's segment
    return (queries[0:1] == ids) & problem.layout.mask.reaches(queries[1:2], keys[:, 1:2])


def in_band(band: Band, keys: slice) -> Array:
    """bool [N, CELL]: which keys, counted from a multiple of CELL, the queries of a cell see."""
    shape, first = (keys.stop - keys.start, CELL), keys.start % CELL
    apart = jax.lax.broadcasted_iota(jnp.int32, shape, 1) - jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    low, high = (apart >= band.low + first, apart <= band.high + first)
    return low if band.high >= CELL - 1 else high if band.low <= 1 - CELL else low & high


def of_cells(cells: Cells, partly: Callable[[slice, slice], Array]) -> Visible | None:
    """What cells show of some keys and queries; `partly` is what the mask shows of such of these as it is given. None where they show all."""
    if all(state == WHOLLY for row in cells for state in row):
        return None

    def visible(some: slice) -> list[tuple[slice, Sees]]:
        found: list[tuple[slice, Sees]] = []
        first = 0
        for state, run in groupby(cells[some.start // CELL]):
            at = slice(first, first := first + CELL * len(list(run)))
            if isinstance(state, Band):
                found += [(slice(n, n + CELL), in_band(state, some)) for n in range(at.start, at.stop, CELL)]
            elif state == PARTLY:
                found.append((at, partly(some, at)))
            else:
                found.append((at, None if state == WHOLLY else False))
        return found

    return visible


def staggered(groups: Sequence[Sequence[int]], *stages: Callable[[int, Any], Any]) -> None:
    """Takes the parts of each group through the stages, one stage behind the group before it: so what stands together in the program is of
    several parts, and the compiler runs the products of one beside the exponentials of another. A stage gets the number of a part and what the
    stage before gave.
    """
    held: dict[int, Any] = {}
    for step in range(len(groups) + len(stages) - 1):
        for stage, do in enumerate(stages):
            for n in groups[step - stage] if 0 <= step - stage < len(groups) else ():
                held[n] = do(n, held.pop(n, None))


class Weighed(NamedTuple):
    """Weights of some keys, and what they add to the sums of their queries."""

    p: Array
    """[N, M], in the values' dtype."""
    rise: Array | None
    """[1, M]: by how many bits the largest weight of the queries rose; None where weights are not relative to it."""
    mass: Array | None
    """[1, M]: sum of weights; None where `Sums.collect` takes it from the product."""
    spread: Array | None
    """[1, M], with statistics: of weights times bits."""


class Sums(NamedTuple):
    """What a kernel carries for its queries while it goes through their keys: references to memory that a core keeps."""

    values: Any
    """[V, M]: sum of weights times values."""
    peak: Any
    """[1, M]: the largest of `products`."""
    total: Any
    """[1, M]: sum of weights."""
    spread: Any = None
    """[1, M], with statistics: u, in bits."""

    @staticmethod
    def of(problem: Problem, value_dim: int, num_queries: int, memory: Any) -> list[Any]:
        """The memory that they take; `memory(shape, dtype)` names some."""
        widths = (value_dim, *[1] * (3 if problem.stats else 2))
        return [memory((width, num_queries), jnp.float32) for width in widths]

    def clear(self) -> None:
        """Begins with no key seen."""
        self.peak[...] = jnp.full_like(self.peak, _NOTHING)
        for x in self:
            if x is not None and x is not self.peak:
                x[...] = jnp.zeros_like(x)

    def weigh(
        self, problem: Problem, bias: Any, z: Array, visible: Visible | None, at: slice, dtype: Any, chosen: Chosen = None
    ) -> Weighed:
        """The weights of keys with products z [N, M] for the queries that stand `at` these columns, of which those see any of a share of the
        keys that are `chosen`; None is all, of `visible` too. The maximum knows of these keys then, and `collect` adds the rest.

        It goes a few keys at a time, so that what is between a product and its weight stays in registers.
        """
        chunks, shares = cuts(0, len(z), CHUNK), 1 if chosen is None else len(chosen)
        sights, size = [visible and visible(n) for n in chunks], len(z) // shares
        peaks: list[Array] = []
        rise = None
        if _relative(problem):
            z = jnp.concatenate([_shown(sight, z[n], HIDDEN) for n, sight in zip(chunks, sights, strict=True)], axis=0)
            old = self.peak[:, at]
            highest = [jnp.max(z[n], axis=0, keepdims=True) for n in cuts(0, len(z), size)]
            if chosen is not None:
                highest = [jnp.where(of, x, old) for of, x in zip(chosen, highest, strict=True)]
            peak = reduce(jnp.maximum, highest, old)
            self.peak[:, at] = peak
            rise = _bits_above(problem, bias, peak, old)
            peaks = [peak] * shares
            if chosen is not None and not problem.sigmoid:  # so far above all that their weights are 0
                peaks, chosen = [jnp.where(of, peak, -HIDDEN) for of in chosen], None
        mass = spread = jnp.zeros((SUBLANES, z.shape[1]), jnp.float32)
        weights = []
        for n, sight in zip(chunks, sights, strict=True):
            if _relative(problem):
                bits = _bits_above(problem, bias, z[n], peaks[n.start // size])
                p = _left_out(sight, jnp.exp2(bits))
            else:
                p = _shown(sight, jax.nn.sigmoid(problem.unit * z[n] + bias), 0)
            if chosen is not None:
                p = jnp.where(chosen[n.start // size], p, 0)
            if not problem.mass_by_product:
                mass += _folded(p)
            if problem.stats:
                spread += _folded(p * bits)
            weights.append(p)
        of = lambda x: jnp.sum(x, axis=0, keepdims=True)
        p = jnp.concatenate(weights, axis=0).astype(dtype)
        return Weighed(p, rise, None if problem.mass_by_product else of(mass), of(spread) if problem.stats else None)

    def collect(self, values: Array, weighed: Weighed, at: slice) -> None:
        """Adds values [V, N] by weights, and the rest, to what is kept; parts of the same queries come in the order of their weighing."""
        keep, num = jnp.float32(1) if weighed.rise is None else jnp.exp2(-weighed.rise), len(values)
        mass, before = weighed.mass, self.total[:, at]
        if mass is None:
            values = jnp.concatenate([values, jnp.ones((ONES, values.shape[1]), values.dtype)], axis=0)
        found = dot(values, weighed.p, NN)
        self.values[:, at] = keep * self.values[:, at] + found[:num]
        if weighed.spread is not None:
            self.spread[:, at] = keep * (self.spread[:, at] - weighed.rise * before) + weighed.spread
        self.total[:, at] = keep * before + (found[num : num + 1] if mass is None else mass)

    def results(self, problem: Problem, bias: Any) -> tuple[Array, list[Array]]:
        """o [V, M] and rows [1, M]: lse and, with statistics, maximum and entropy."""
        some = self.total[...] > 0
        mass = jnp.where(some, self.total[...], 1)
        log_mass, highest = jnp.log(mass), _log_weight(problem, bias, self.peak[...])
        values, relative = self.values[...], _relative(problem)
        if relative:
            values = values * jnp.exp(highest + bias) if problem.sigmoid else values * (1 / mass)
        rows = [jnp.where(some, log_mass + highest if relative else log_mass, HIDDEN)]
        if problem.stats:
            rows.append(jnp.where(some, problem.unit * self.peak[...], HIDDEN))
            rows.append(jnp.where(some, log_mass - self.spread[...] / (LOG2_E * mass), 0))
        return values, rows


def shown(visible: Visible | None, x: Array, otherwise: float) -> Array:
    """x [N, M] where a query sees a key."""
    if visible is None:
        return x
    return jnp.concatenate([_shown(visible(n), x[n], otherwise) for n in cuts(0, len(x), CELL)], axis=0)


def _shown(runs: Sequence[tuple[slice, Sees]] | None, x: Array, otherwise: float) -> Array:
    def shown(x: Array, sees: Sees) -> Array:
        if sees is None:
            return x
        return jnp.full_like(x, otherwise) if sees is False else jnp.where(sees, x, otherwise)

    return x if runs is None else jnp.concatenate([shown(x[:, at], sees) for at, sees in runs], axis=1)


def _left_out(runs: Sequence[tuple[slice, Sees]] | None, x: Array) -> Array:
    """x [N, M], and 0 where a query sees none of the keys: nothing is computed there."""
    return _shown(runs and [(at, sees if sees is False else None) for at, sees in runs], x, 0)


def _folded(x: Array) -> Array:
    """x [N, M] added up to as many rows as a register has."""
    return jnp.sum(x.reshape(-1, SUBLANES, x.shape[1]), axis=0)


def _relative(problem: Problem) -> bool:
    """Weights are kept relative to the largest."""
    return problem.stats or not problem.sigmoid


def _log_sigmoid(x: Array, bias: Any) -> Array:
    """log sigmoid(x + bias) - bias, which does not lose x beside a large bias."""
    return jnp.minimum(x, -bias) - jnp.log1p(jnp.exp(-abs(x + bias)))


def _log_weight(problem: Problem, bias: Any, z: Array) -> Array:
    return _log_sigmoid(problem.unit * z, bias) if problem.sigmoid else problem.unit * z


def _bits_above(problem: Problem, bias: Any, z: Array, low: Array) -> Array:
    """log2 of the ratio of the weights of two logits."""
    if problem.sigmoid:
        return LOG2_E * (_log_weight(problem, bias, z) - _log_weight(problem, bias, low))
    return (problem.unit * LOG2_E) * (z - low)


def gradients(
    problem: Problem, bias: Any, z: Array, d_weights: Array, rows: Array, visible: Visible | None, chosen: Chosen = None
) -> tuple[Array, Array, Array]:
    """The weights, dz and the part of dz that the sigmoid's bias shares, all [N, M].

    z [N, M] are `products`, d_weights [N, M] the values times d_o, and the rows [R, M] fit z: see `stacked_rows`. The weights are A, of the
    sigmoid with statistics W. Queries that are not `chosen` see nothing of a share of the keys.
    """
    if chosen is not None and len(chosen) > 1:
        each = []
        for n, keys in enumerate(cuts(0, len(z), len(z) // len(chosen))):
            of_share = None if visible is None else partial(_from, visible, keys.start)
            each.append(gradients(problem, bias, z[keys], d_weights[keys], rows, of_share, chosen[n : n + 1]))
        weights, d_logits, shared = (jnp.concatenate(x, axis=0) for x in zip(*each, strict=True))
        return weights, d_logits, shared
    of = None if chosen is None else chosen[0]
    if of is not None:  # logarithms of sums so far above all that weights are 0, and nothing to give
        rows = jnp.concatenate([jnp.where(of, rows[:1], -HIDDEN), jnp.where(of, rows[1:], 0)], axis=0)
    if problem.sigmoid and not problem.stats:
        weights = jax.nn.sigmoid(problem.unit * z + bias)
    else:
        e = LOG2_E * _log_sigmoid(problem.unit * z, bias) if problem.sigmoid else (problem.unit * LOG2_E) * z
        bits = e - rows[0:1]
        weights = jnp.exp2(bits)
    weights = shown(visible, weights, 0)
    if of is not None and problem.sigmoid:
        weights = jnp.where(of, weights, 0)
    d_weights = d_weights + rows[1:2]
    if problem.stats:
        d_weights -= rows[2:3] * bits
    d_logits = d_weights * weights
    if problem.sigmoid:
        d_logits *= 1 - (rows[5:6] * weights if problem.stats else weights)
    shared = d_logits
    if problem.stats:
        d_logits += shown(visible, jnp.where(z >= rows[4:5], rows[3:4], 0), 0)
    if problem.soft_cap is not None:
        d_logits *= (1 - z) * (1 + z)
    return weights, d_logits, shared


def _from(visible: Visible, first: int, some: slice) -> Sequence[tuple[slice, Sees]]:
    """What is visible of keys counted from a first one."""
    return visible(slice(first + some.start, first + some.stop))


def stacked_rows(unit: float, rows: Sequence[Array]) -> Array:
    """The rows of `plait.kernels.attention.per_query.gradient_rows`, stacked [B, H, R, T] and in a unit of logits."""
    lse, c1, *stats = rows
    stacked = [lse * LOG2_E, c1]
    if stats:
        c, d_peak, threshold, *total = stats
        stacked += [c / LOG2_E, d_peak, threshold / unit, *total]
    return jnp.stack(stacked, axis=2).astype(jnp.float32)
