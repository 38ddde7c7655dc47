"""The kernels of flash attention for TPU: forward, gradients, column mass. The math is in `pallas_tpu`."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.attention.tpu import carried
from plait.kernels.attention.tpu.edges import PARTLY
from plait.kernels.attention.tpu.tiling import SUBLANES, Course, Operands, Part, Problem, Tiling, rounded_up
from plait.kernels.attention.tpu.weights import (
    LOG2_E,
    NN,
    NT,
    Sums,
    Visible,
    Weighed,
    dot,
    gradients,
    of_cells,
    products,
    seen,
    shown,
    stacked_rows,
    staggered,
)
from plait.kernels.attention.visits import SKIP

Array = jax.Array


class _Keys(NamedTuple):
    """Some keys of a tile: where they are and, under the mask, segments and positions [N, 2]."""

    at: slice
    tokens: Any = None


def _parts(course: Course, kind: int, tokens: Sequence[Any]) -> Iterator[tuple[_Keys, list[Part]]]:
    """The parts of a tile of a kind: some keys, and in turn some queries. `tokens` are those of queries and keys, [1, 1, 2, tile] each."""
    for at, parts in course.parts(kind):
        asked = any(state == PARTLY for part in parts for row in part.cells for state in row)
        yield _Keys(at, tokens[1][0, 0, :, at].T if asked else None), parts


def _visible(course: Course, tokens: Sequence[Any], keys: _Keys, part: Part) -> Visible | None:
    """Which of the keys the queries of a part see; the mask is not looked at where nothing is hidden."""

    def partly(some: slice, at: slice) -> Array:
        queries = slice(part.queries.start + at.start, part.queries.start + at.stop)
        return seen(course.problem, tokens[0][0, 0, :, queries], keys.tokens[some])

    return of_cells(part.cells, partly)


def _by_kind(course: Course, kind: Array, work: Callable[[int], None]) -> None:
    """Runs work(kind) as the tile asks."""
    for possible in course.edges.possible:
        pl.when(kind == possible)(partial(work, possible))


def _forward_kernel(course: Course, table: Any, bias: Any, *refs: Any) -> None:
    problem = course.problem
    q, k, v, *tokens = refs[:5]
    o, rows, *state = refs[5:]
    b, h, index = (pl.program_id(axis) for axis in range(3))
    step, sums = course.steps.read(table, b, h, index), Sums(*state)

    pl.when(step.first == 1)(sums.clear)

    def work(kind: int) -> None:
        parts = []
        for keys, of_keys in _parts(course, kind, tokens):
            values = v[0, 0, keys.at].T
            parts += [(keys, values, part) for part in of_keys]

        def logits(n: int, _: None) -> Array:
            keys, _, part = parts[n]
            return products(problem, k[0, 0, keys.at], q[0, 0, part.queries])

        def weights(n: int, z: Array) -> Weighed:
            keys, values, part = parts[n]
            return sums.weigh(problem, bias[h], z, _visible(course, tokens, keys, part), part.queries, values.dtype)

        def outputs(n: int, weighed: Weighed) -> None:
            _, values, part = parts[n]
            sums.collect(values, weighed, part.queries)

        staggered(course.groups([part for _, _, part in parts]), logits, weights, outputs)

    _by_kind(course, step.kind, work)

    @pl.when(step.last == 1)
    def _finish():
        values, found = sums.results(problem, bias[h])
        o[0, 0] = values.astype(o.dtype)
        for i, row in enumerate(found):
            rows[0, 0, i : i + 1] = row


def forward(problem: Problem, x: Operands) -> tuple[Array, tuple[Array, ...]]:
    """o [B, H, V, T] in q's dtype, and rows [B, H, T]: lse, of the sigmoid with statistics less the bias, and, with statistics,
    maximum and entropy."""
    tile, length, value_dim = problem.tiles.forward, x.q.shape[2], x.v.shape[3]
    tiling = Tiling(problem, x, tile, x.q.shape[3] + value_dim)
    num_rows = 3 if problem.stats else 1
    o, rows = tiling.over_queries(
        _forward_kernel,
        "attention_forward",
        outputs=((value_dim, x.q.dtype), (num_rows, jnp.float32)),
        scratch=Sums.of(problem, value_dim, tile.block_q, pltpu.VMEM),
    )
    return o[..., :length], tuple(rows[:, :, i, :length] for i in range(num_rows))


def _gradients_kernel(course: Course, table: Any, bias: Any, *refs: Any) -> None:
    problem = course.problem
    *inputs, _, d_k, d_v, far, k_acc, v_acc, blocks, arrived, left, state = refs
    q, k, v, d_o, rows, *tokens = inputs
    key_dim, upright = q.shape[3], problem.sums_by_key_column
    b, h, index, member = (pl.program_id(axis) for axis in range(4))
    num_members = pl.num_programs(3)

    def place(n: Array) -> carried.Place:
        step = course.steps.read(table, b, h, jax.lax.div(n, num_members))
        head = h * course.group + step.member + jax.lax.rem(n, num_members)  # one of the two members is 0
        return carried.Place(head, step.minor, step.kind != SKIP)

    n, count = index * num_members + member, pl.num_programs(2) * num_members
    sums = carried.Carried(far.at[b], blocks, arrived, left, state, place=place, n=n, count=count)
    step, head = course.steps.read(table, b, h, index), sums.place.head

    @pl.when((step.first == 1) & (member == 0))
    def _start():
        k_acc[...] = jnp.zeros_like(k_acc)
        v_acc[...] = jnp.zeros_like(v_acc)

    def work(kind: int) -> None:
        parts = [(keys, k[0, 0, keys.at].T, part) for keys, of_keys in _parts(course, kind, tokens) for part in of_keys]
        sides = [x[0, 0].T for x in (d_o, q)] if upright else []  # [V, M], [K, M]

        def factors(n: int, _: None) -> tuple[Array, Array]:
            keys, _, part = parts[n]
            z = products(problem, k[0, 0, keys.at], q[0, 0, part.queries])
            return z, dot(v[0, 0, keys.at], d_o[0, 0, part.queries], NT)

        def weights(n: int, found: tuple[Array, Array]) -> tuple[Array, Array]:
            keys, _, part = parts[n]
            visible = _visible(course, tokens, keys, part)
            weights, d_logits, shared = gradients(problem, bias[head], *found, rows[0, 0, :, part.queries], visible)
            if problem.sigmoid:
                sums.here[key_dim : key_dim + 1, part.queries] += jnp.sum(shared, axis=0, keepdims=True)
            return weights.astype(d_o.dtype), d_logits.astype(q.dtype)

        def add(n: int, found: tuple[Array, Array]) -> None:
            keys, turned, part = parts[n]
            weights, d_logits = found
            if upright:
                for acc, side, x in zip((v_acc, k_acc), sides, found, strict=True):
                    acc[:, keys.at] += dot(side[:, part.queries], x, NT)  # [V, N], [K, N]
            else:
                v_acc[keys.at] += dot(weights, d_o[0, 0, part.queries], NN)  # [N, V]
                k_acc[keys.at] += dot(d_logits, q[0, 0, part.queries], NN)  # [N, K]
            sums.here[:key_dim, part.queries] += dot(turned, d_logits, NN)  # [K, M]

        staggered(course.groups([part for _, _, part in parts]), factors, weights, add)

    sums.enter()
    _by_kind(course, step.kind, work)
    sums.leave()

    @pl.when((step.last == 1) & (member == num_members - 1))
    def _finish():
        turn = (lambda x: x.T) if upright else (lambda x: x)
        d_k[0, 0] = turn(problem.scale * k_acc[...]).astype(d_k.dtype)
        d_v[0, 0] = turn(v_acc[...]).astype(d_v.dtype)


def all_gradients(problem: Problem, x: Operands, d_o: Array, rows: Sequence[Array]) -> tuple[Array, Array, Array, Array]:
    """dq [B, H, T, K], dk [B, Hkv, S, K] and dv [B, Hkv, S, V] summed over the heads of each group, and the gradient [H] of the sigmoid's
    bias, for d_o [B, H, T, V].

    The float32 rows [B, H, T] are those of `plait.kernels.attention.per_query.gradient_rows`.
    """
    tile, length, num_keys, dims = problem.tiles.gradients, x.q.shape[2], x.k.shape[2], (x.k.shape[3], x.v.shape[3])
    width = rounded_up(dims[0], SUBLANES) + (SUBLANES if problem.sigmoid else 0)
    d_k, d_v, sums = Tiling(problem, x, tile, 3 * dims[0] + 2 * dims[1]).over_keys(
        _gradients_kernel,
        "attention_gradients",
        extra=((d_o, "q", 2), (stacked_rows(problem.unit, rows), "q", 3)),
        outputs=((dims[0], x.k.dtype), (dims[1], x.v.dtype)),
        scratch=[pltpu.VMEM((n, tile.block_kv) if problem.sums_by_key_column else (tile.block_kv, n), jnp.float32) for n in dims],
        sums=width,
    )
    d_q = (problem.scale * jnp.swapaxes(sums[:, :, : dims[0], :length], 2, 3)).astype(x.q.dtype)
    d_bias = jnp.sum(sums[:, :, dims[0], :length], axis=(0, 2)) if problem.sigmoid else jnp.zeros_like(x.bias)
    return d_q, d_k[:, :, :num_keys], d_v[:, :, :num_keys], d_bias


def _column_mass_kernel(course: Course, table: Any, bias: Any, *refs: Any) -> None:
    problem = course.problem
    q, k, lse, *tokens, mass, total = refs
    b, h, index = (pl.program_id(axis) for axis in range(3))
    step = course.steps.read(table, b, h, index)

    @pl.when(step.first == 1)
    def _start():
        total[...] = jnp.zeros_like(total)

    def work(kind: int) -> None:
        for keys, parts in _parts(course, kind, tokens):
            for part in parts:
                z = products(problem, k[0, 0, keys.at], q[0, 0, part.queries])
                weights = jnp.exp2((problem.unit * LOG2_E) * z - lse[0, 0, 0:1, part.queries])
                weights = shown(_visible(course, tokens, keys, part), weights, 0)
                total[keys.at] += jnp.sum(weights, axis=1, keepdims=True)

    _by_kind(course, step.kind, work)

    @pl.when(step.last == 1)
    def _finish():
        mass[0, 0] = total[...]


def column_mass(problem: Problem, x: Operands, lse: Array) -> Array:
    """sum_i A_ij, float32 [B, H, S], for lse [B, H, T] that is large where a row sees nothing."""
    tile = problem.tiles.gradients
    tiling = Tiling(problem, x, tile, x.q.shape[3])
    tiling.num_kv_heads = tiling.num_heads  # each head has sums of its own, on the keys it shares
    (mass,) = tiling.over_keys(
        _column_mass_kernel,
        "attention_column_mass",
        extra=(((lse * LOG2_E)[:, :, None], "q", 3),),
        outputs=((1, jnp.float32),),
        scratch=[pltpu.VMEM((tile.block_kv, 1), jnp.float32)],
    )
    return mass[:, :, : x.k.shape[2], 0]
