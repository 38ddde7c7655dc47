"""The kernels of flash attention for TPU: forward, query gradients, key gradients, column mass. The math is in `pallas_tpu`."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.attention.reference import MASKED as HIDDEN
from plait.kernels.attention.tpu.tiling import Cut, Operands, Part, Problem, Tiling
from plait.kernels.masks import block_number
from plait.kernels.shapes import matmul_precision

Array = jax.Array

_LOG2_E = 1.4426950408889634
_NOTHING = HIDDEN / 2
"""The largest logit of a row that has seen no key yet: hidden ones lie so far below it that their weights are 0."""

_NT, _NN = ((((a,), (b,)), ((), ())) for a, b in ((1, 1), (1, 0)))


def _dot(a: Array, b: Array, dims: Any) -> Array:
    """A product of two tiles in float32; 16-bit operands are exact in it, float32 ones get full precision."""
    return jax.lax.dot_general(a, b, dims, precision=matmul_precision(a.dtype), preferred_element_type=jnp.float32)


def _products(problem: Problem, k: Array, q: Array) -> Array:
    """k . q [N, M], unscaled; with a soft cap, what scaled is the capped logit."""
    z = _dot(k, q, _NT)
    if problem.soft_cap is None:
        return z
    unit = problem.soft_cap / problem.scale
    return unit * jnp.tanh(z * (1 / unit))


def _log_sigmoid(x: Array, bias: Array) -> Array:
    """log sigmoid(x + bias) - bias, which does not lose x beside a large bias."""
    return x - jnp.maximum(x + bias, 0) - jnp.log1p(jnp.exp(-abs(x + bias)))


class _Keys(NamedTuple):
    """Some keys of a tile: where they are and, under the mask, their tokens as columns int32 [N, 1]."""

    at: slice
    ids: Any = None
    positions: Any = None


def _parts(cut: Cut, kind: int, tokens: Sequence[Any]) -> Iterator[tuple[_Keys, list[Part]]]:
    """The parts of a tile of a kind: some keys, and in turn some queries."""
    for at, parts in cut.parts(kind):
        if any(part.masked for part in parts):
            columns = tokens[1][0, 0, :, at].T
            yield _Keys(at, columns[:, 0:1], columns[:, 1:2]), parts
        else:
            yield _Keys(at), parts


def _visible(problem: Problem, tokens: Sequence[Any], keys: _Keys, queries: slice) -> Array:
    """bool [N, M]: which keys a query sees.

    `tokens` are (segments, positions) of queries and keys, [2, tile] each; where queries select blocks, a third array int32
    [1, tile] holds the bits of `SelectedBlocks.bits`.
    """
    q_ids, q_positions = tokens[0][0, 0, 0:1, queries], tokens[0][0, 0, 1:2, queries]
    some = jnp.where(keys.ids == 0, -1, keys.ids)  # padding is nobody's segment
    visible = (q_ids == some) & problem.layout.mask.reaches(q_positions, keys.positions)
    if problem.block_size is not None:
        at = keys.positions
        begin = jnp.maximum(at - keys.at.start - jax.lax.broadcasted_iota(jnp.int32, at.shape, 0), 0)
        size = problem.block_size
        entry = jnp.broadcast_to(block_number(at, size) - block_number(begin, size), visible.shape)
        bits = jnp.broadcast_to(tokens[2][0, 0, 0, :, queries], visible.shape)
        visible &= (jax.lax.shift_right_logical(bits, entry) & 1) == 1
    return visible


def _by_kind(cut: Cut, kind: Array, work: Callable[[int], None]) -> None:
    """Runs work(kind) as the tile asks."""
    for possible in cut.edges.possible:
        pl.when(kind == possible)(partial(work, possible))


def _weights_and_gradient(
    problem: Problem, masked: bool, bias: Array, refs: Sequence[Any], keys: _Keys, queries: slice
) -> tuple[Array, Array, Array]:
    """The weights, dz and the part of dz that the sigmoid's bias shares, all [N, M], of a part of a tile of the backward pass.

    z is q . k without the scale, and the rows [R, M] fit it: see `_gradient_rows`. The weights are A, of the sigmoid with statistics W.
    """
    tokens = refs[5:]
    q, k, v, d_o = refs[0][0, 0, queries], refs[1][0, 0, keys.at], refs[2][0, 0, keys.at], refs[3][0, 0, queries]
    rows = refs[4][0, 0, :, queries]
    z = _products(problem, k, q)
    if problem.sigmoid and not problem.stats:
        weights = jax.nn.sigmoid(problem.scale * z + bias)
    else:
        e = _LOG2_E * _log_sigmoid(problem.scale * z, bias) if problem.sigmoid else (problem.scale * _LOG2_E) * z
        bits = e - rows[0:1]
        weights = jnp.exp2(bits)
    if masked:
        visible = _visible(problem, tokens, keys, queries)
        weights = jnp.where(visible, weights, 0)
    d_weights = _dot(v, d_o, _NT) + rows[1:2]
    if problem.stats:
        d_weights -= rows[2:3] * bits
    d_logits = d_weights * weights
    if problem.sigmoid:
        d_logits *= 1 - (rows[5:6] * weights if problem.stats else weights)
    shared = d_logits
    if problem.stats:
        highest = z >= rows[4:5]
        d_logits += jnp.where(highest & visible if masked else highest, rows[3:4], 0)
    if problem.soft_cap is not None:
        d_logits *= 1 - jnp.square(z * (problem.scale / problem.soft_cap))
    return weights, d_logits, shared


def _gradient_rows(problem: Problem, rows: Sequence[Array]) -> Array:
    """The rows of `plait.kernels.attention.per_query.gradient_rows`, stacked [B, H, R, T] and in the units of unscaled logits."""
    lse, c1, *stats = rows
    stacked = [lse * _LOG2_E, c1]
    if stats:
        c, d_peak, threshold, *total = stats
        stacked += [c / _LOG2_E, d_peak, threshold / problem.scale, *total]
    return jnp.stack(stacked, axis=2).astype(jnp.float32)


def _forward_kernel(cut: Cut, table: Any, bias: Any, *refs: Any) -> None:
    problem = cut.problem
    q, k, v, *rest = refs
    num_tokens = 2 if problem.block_size is None else 3
    tokens, (o, rows, acc, *state) = rest[:num_tokens], rest[num_tokens:]
    b, h, index = (pl.program_id(axis) for axis in range(3))
    step = cut.steps.read(table, b, h, index)
    peak, total, *extra = state  # each [1, M]: the largest q . k, l and, with statistics, u in bits
    relative = problem.stats or not problem.sigmoid  # weights are kept relative to the largest

    def log_weight(z: Array) -> Array:
        return _log_sigmoid(problem.scale * z, bias[h]) if problem.sigmoid else problem.scale * z

    def bits_above(z: Array, low: Array) -> Array:
        """log2 of the ratio of the weights of two logits."""
        if problem.sigmoid:
            return _LOG2_E * (log_weight(z) - log_weight(low))
        return (problem.scale * _LOG2_E) * (z - low)

    @pl.when(step.first == 1)
    def _start():
        peak[...] = jnp.full_like(peak, _NOTHING)
        for x in (total, acc, *extra):
            x[...] = jnp.zeros_like(x)

    def part(masked: bool, keys: _Keys, values: Array, queries: slice) -> None:
        z = _products(problem, k[0, 0, keys.at], q[0, 0, queries])  # [N, M]
        if masked:
            visible = _visible(problem, tokens, keys, queries)
        shown = jnp.where(visible, z, HIDDEN) if masked else z
        if relative:
            old = peak[:, queries]
            highest = jnp.maximum(old, jnp.max(shown, axis=0, keepdims=True))
            peak[:, queries] = highest
            exponents, rise = bits_above(shown, highest), bits_above(highest, old)
            p, keep = jnp.exp2(exponents), jnp.exp2(-rise)
        else:
            p, keep = jax.nn.sigmoid(problem.scale * z + bias[h]), jnp.float32(1)
            p = jnp.where(visible, p, 0) if masked else p
        mass = total[:, queries]
        if problem.stats:
            spread = extra[0][:, queries]
            extra[0][:, queries] = keep * (spread - rise * mass) + jnp.sum(p * exponents, axis=0, keepdims=True)
        total[:, queries] = keep * mass + jnp.sum(p, axis=0, keepdims=True)
        acc[:, queries] = keep * acc[:, queries] + _dot(values, p.astype(v.dtype), _NN)  # [V, M]

    def work(kind: int) -> None:
        for keys, parts in _parts(cut, kind, tokens):
            values = v[0, 0, keys.at].T
            for queries, masked in parts:
                part(masked, keys, values, queries)

    _by_kind(cut, step.kind, work)

    @pl.when(step.last == 1)
    def _finish():
        some = total[...] > 0
        mass = jnp.where(some, total[...], 1)
        log_mass, highest = jnp.log(mass), log_weight(peak[...])
        values = acc[...]
        if relative:
            values = values * jnp.exp(highest + bias[h]) if problem.sigmoid else values / mass
        o[0, 0] = values.astype(o.dtype)
        rows[0, 0, 0:1] = jnp.where(some, log_mass + highest if relative else log_mass, HIDDEN)
        if problem.stats:
            rows[0, 0, 1:2] = jnp.where(some, problem.scale * peak[...], HIDDEN)
            rows[0, 0, 2:3] = jnp.where(some, log_mass - extra[0][...] / (_LOG2_E * mass), 0)


def forward(problem: Problem, x: Operands) -> tuple[Array, tuple[Array, ...]]:
    """o [B, H, V, T] in q's dtype, and rows [B, H, T]: lse, of the sigmoid with statistics less the bias, and, with statistics,
    maximum and entropy."""
    tile, length, value_dim = problem.tiles.forward, x.q.shape[2], x.v.shape[3]
    tiling = Tiling(problem, x, tile)
    num_rows = 3 if problem.stats else 1
    state = [pltpu.VMEM((1, tile.block_q), jnp.float32)] * (3 if problem.stats else 2)
    o, rows = tiling.over_queries(
        _forward_kernel,
        "attention_forward",
        outputs=((value_dim, x.q.dtype), (num_rows, jnp.float32)),
        scratch=[pltpu.VMEM((value_dim, tile.block_q), jnp.float32), *state],
    )
    return o[..., :length], tuple(rows[:, :, i, :length] for i in range(num_rows))


def _query_gradients_kernel(cut: Cut, table: Any, bias: Any, *refs: Any) -> None:
    problem = cut.problem
    *inputs, d_q, d_bias, acc, shared_acc = refs
    k = inputs[1]
    b, h, index = (pl.program_id(axis) for axis in range(3))
    step = cut.steps.read(table, b, h, index)

    @pl.when(step.first == 1)
    def _start():
        acc[...] = jnp.zeros_like(acc)
        shared_acc[...] = jnp.zeros_like(shared_acc)

    def work(kind: int) -> None:
        for keys, parts in _parts(cut, kind, inputs[5:]):
            turned = k[0, 0, keys.at].T
            for queries, masked in parts:
                _, d_logits, shared = _weights_and_gradient(problem, masked, bias[h], inputs, keys, queries)
                acc[:, queries] += _dot(turned, d_logits.astype(k.dtype), _NN)  # [K, M]
                if problem.sigmoid:
                    shared_acc[:, queries] += jnp.sum(shared, axis=0, keepdims=True)

    _by_kind(cut, step.kind, work)

    @pl.when(step.last == 1)
    def _finish():
        d_q[0, 0] = (problem.scale * acc[...]).astype(d_q.dtype)
        d_bias[0, 0] = shared_acc[...]


def query_gradients(problem: Problem, x: Operands, d_o: Array, rows: Sequence[Array]) -> tuple[Array, Array]:
    """dq [B, H, T, K] and the gradient [H] of the sigmoid's bias, for d_o [B, H, T, V].

    The float32 rows [B, H, T] are those of `plait.kernels.attention.per_query.gradient_rows`.
    """
    tile, length, key_dim = problem.tiles.query_gradients, x.q.shape[2], x.q.shape[3]
    d_q, d_bias = Tiling(problem, x, tile).over_queries(
        _query_gradients_kernel,
        "attention_query_gradients",
        extra=((d_o, "q", 2), (_gradient_rows(problem, rows), "q", 3)),
        outputs=((key_dim, x.q.dtype), (1, jnp.float32)),
        scratch=[pltpu.VMEM((n, tile.block_q), jnp.float32) for n in (key_dim, 1)],
    )
    return jnp.swapaxes(d_q[..., :length], 2, 3), jnp.sum(d_bias, axis=(0, 2, 3))


def _key_gradients_kernel(cut: Cut, table: Any, bias: Any, *refs: Any) -> None:
    problem = cut.problem
    *inputs, d_k, d_v, k_acc, v_acc = refs
    q, d_o = inputs[0], inputs[3]
    b, h, index, member = (pl.program_id(axis) for axis in range(4))
    step, num_members = cut.steps.read(table, b, h, index), pl.num_programs(3)
    head = h * cut.group + step.member + member  # one of the two is 0

    @pl.when((step.first == 1) & (member == 0))
    def _start():
        k_acc[...] = jnp.zeros_like(k_acc)
        v_acc[...] = jnp.zeros_like(v_acc)

    def work(kind: int) -> None:
        for keys, parts in _parts(cut, kind, inputs[5:]):
            for queries, masked in parts:
                weights, d_logits, _ = _weights_and_gradient(problem, masked, bias[head], inputs, keys, queries)
                v_acc[keys.at] += _dot(weights.astype(d_o.dtype), d_o[0, 0, queries], _NN)  # [N, V]
                k_acc[keys.at] += _dot(d_logits.astype(q.dtype), q[0, 0, queries], _NN)  # [N, K]

    _by_kind(cut, step.kind, work)

    @pl.when((step.last == 1) & (member == num_members - 1))
    def _finish():
        d_k[0, 0] = (problem.scale * k_acc[...]).astype(d_k.dtype)
        d_v[0, 0] = v_acc[...].astype(d_v.dtype)


def key_gradients(problem: Problem, x: Operands, d_o: Array, rows: Sequence[Array]) -> tuple[Array, Array]:
    """dk [B, Hkv, S, K] and dv [B, Hkv, S, V], summed over the heads of each group; arguments as in `query_gradients`."""
    tile, num_keys, dims = problem.tiles.key_gradients, x.k.shape[2], (x.k.shape[3], x.v.shape[3])
    d_k, d_v = Tiling(problem, x, tile).over_keys(
        _key_gradients_kernel,
        "attention_key_gradients",
        extra=((d_o, "q", 2), (_gradient_rows(problem, rows), "q", 3)),
        outputs=((dims[0], x.k.dtype), (dims[1], x.v.dtype)),
        scratch=[pltpu.VMEM((tile.block_kv, n), jnp.float32) for n in dims],
    )
    return d_k[:, :, :num_keys], d_v[:, :, :num_keys]


def _column_mass_kernel(cut: Cut, table: Any, bias: Any, *refs: Any) -> None:
    problem = cut.problem
    q, k, lse, *tokens, mass, total = refs
    b, h, index = (pl.program_id(axis) for axis in range(3))
    step = cut.steps.read(table, b, h, index)

    @pl.when(step.first == 1)
    def _start():
        total[...] = jnp.zeros_like(total)

    def work(kind: int) -> None:
        for keys, parts in _parts(cut, kind, tokens):
            for queries, masked in parts:
                z = _products(problem, k[0, 0, keys.at], q[0, 0, queries])
                weights = jnp.exp2((problem.scale * _LOG2_E) * z - lse[0, 0, 0:1, queries])
                if masked:
                    weights = jnp.where(_visible(problem, tokens, keys, queries), weights, 0)
                total[keys.at] += jnp.sum(weights, axis=1, keepdims=True)

    _by_kind(cut, step.kind, work)

    @pl.when(step.last == 1)
    def _finish():
        mass[0, 0] = total[...]


def column_mass(problem: Problem, x: Operands, lse: Array) -> Array:
    """sum_i A_ij, float32 [B, H, S], for lse [B, H, T] that is large where a row sees nothing."""
    tile = problem.tiles.key_gradients
    tiling = Tiling(problem, x, tile)
    tiling.num_kv_heads = tiling.num_heads  # each head has sums of its own, on the keys it shares
    (mass,) = tiling.over_keys(
        _column_mass_kernel,
        "attention_column_mass",
        extra=(((lse * _LOG2_E)[:, :, None], "q", 3),),
        outputs=((1, jnp.float32),),
        scratch=[pltpu.VMEM((tile.block_kv, 1), jnp.float32)],
    )
    return mass[:, :, : x.k.shape[2], 0]
