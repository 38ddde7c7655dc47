"""The two Pallas kernels of the linear recurrences on TPU; see `tpu_driver`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.recurrence.tpu_chunk import SUBLANES, Bounds, Inputs, ValueHead, Written, column, iota
from plait.kernels.recurrence.tpu_grid import LANES, Grid, Operands, Problem, kernel_name, laid_shape, lay, like_of, token_major
from plait.kernels.shapes import l2_normalize

Array = jax.Array

_Rows = tuple[Array, ...] | None


def _at(ref: Any, head: int, tokens: slice, width: int) -> tuple[Any, ...]:
    """The index of a head in a block of `Grid.heads`."""
    if len(ref.shape) == 2:
        return tokens, slice(head * width, (head + 1) * width)
    return head, tokens, slice(None)


def _load(grid: "Grid", refs: list[Any]) -> tuple[list[list[Inputs]], list[_Rows]]:
    """Each key head's chunks of a block, and the chunks' token rows, from the refs of `Grid.inputs`."""
    x, num_gates = grid.x, sum(g is not None for g in grid.x.gates)
    (q, k, v), gates, rows = refs[:3], refs[3 : 3 + num_gates], refs[3 + num_gates :]

    def read(ref: Any, head: int, n: int, width: int) -> Array:
        return ref[_at(ref, head, grid.tokens(n), width)].astype(jnp.float32)

    def value_head(head: int, n: int) -> ValueHead:
        left = iter(gates)
        own = [
            None if g is None else next(left)[head, n : n + 1, :] if g.ndim == 3 else read(next(left), head, n, g.shape[3])
            for g in x.gates
        ]
        return ValueHead(read(v, head, n, x.v.shape[3]), tuple(own))

    def key_head(head: int, n: int) -> Inputs:
        values = range(head * grid.members, (head + 1) * grid.members)
        width = x.q.shape[3]
        return Inputs(read(q, head, n, width), read(k, head, n, width), tuple(value_head(h, n) for h in values))

    loaded = [[key_head(head, n) for n in range(grid.chunks)] for head in range(grid.keys)]
    return loaded, [tuple(rows[0][r, n : n + 1] for r in range(3)) if rows else None for n in range(grid.chunks)]


def _real(problem: Problem, x: Inputs, rows: _Rows) -> Inputs:
    """A chunk with zeros at padding, which thus is skipped, and with queries and keys of norm 1 if they are to be."""
    if rows is not None:
        row = rows[2] != 0
        real = column(rows[2]) != 0
        x = jax.tree.map(lambda y: jnp.where(row if y.shape[0] == 1 else real, y, 0.0), x)
    if (eps := problem.l2_norm_eps) is None:
        return x

    def unit(y: Array) -> Array:
        y = l2_normalize(y, eps)
        return (
            y if problem.full else y + jax.lax.stop_gradient(y.astype(jnp.bfloat16).astype(y.dtype) - y)
        )  # products take it exactly

    return x._replace(q=unit(x.q), k=unit(x.k))


def _advance(problem: Problem, keys: list[list[Inputs]], rows: list[_Rows], states: list[Array]) -> list[list[Written]]:
    """What the chunks of a block give, for each value head."""
    bounds = [None if row is None else Bounds.of(*row[:2]) for row in rows]
    real = [[_real(problem, x, row) for x, row in zip(chunks, rows, strict=True)] for chunks in keys]
    written = problem.block(problem.full, real, bounds, states)
    return [[w._replace(o=problem.scale * w.o) for w in head] for head in written]


def _sums(k: Array, g: Array | None, written: Written) -> tuple[Array, Array, Array]:
    """[1, 1] each: the leaving state's squares, and the sums of |k| |u| and of -g."""
    total = lambda y: jnp.sum(jnp.sum(y, axis=0, keepdims=True), axis=1, keepdims=True)
    squares = lambda y: jnp.sum(y * y, axis=1, keepdims=True)
    rate = jnp.zeros((1, 1), jnp.float32) if g is None else total(g) * (-1.0 / (1 if g.shape[0] == 1 else g.shape[1]))
    return total(written.state * written.state), total(jnp.sqrt(squares(k) * squares(written.values))), rate


def _forward_kernel(problem: Problem, grid: Grid, keep: bool, initial: Any, *refs: Any) -> None:
    outputs = 2 + keep + problem.stats
    inputs, (o, final, *extra) = list(refs[:-outputs]), refs[-outputs:]
    own = [pl.program_id(3) * grid.num_values + h for h in range(grid.num_values)]

    @pl.when(pl.program_id(2) == 0)
    def _start():
        for at in own:
            final[at] = initial[at]

    loaded, rows = _load(grid, inputs)
    entering = [final[at] for at in own]
    written = _advance(problem, loaded, rows, entering)
    for h, head in enumerate(written):
        for n, state in enumerate([entering[h], *(w.state for w in head[:-1])]):
            if keep and n % problem.tiles.backward_chunks == 0:
                extra[0][h, n // problem.tiles.backward_chunks] = state
        final[own[h]] = head[-1].state
        for n, w in enumerate(head):
            o[_at(o, h, grid.tokens(n), w.o.shape[1])] = w.o.astype(o.dtype)
        if problem.stats:
            collected = jnp.zeros((SUBLANES, LANES), jnp.float32)
            row, lane = iota(collected.shape, 0), iota(collected.shape, 1)
            for n, w in enumerate(head):
                x = _real(problem, loaded[h // grid.members][n], rows[n])
                for r, value in enumerate(_sums(x.k, x.heads[h % grid.members].gates[0], w)):
                    collected = jnp.where((row == r) & (lane == n), value, collected)
            extra[-1][h] = collected


def forward(problem: Problem, x: Operands, *, keep: bool) -> tuple[Array, Array, Array | None, Array | None]:
    """o, the final state, the sums, and with `keep` the states [B, blocks, Hv, n, V, K] that enter a block's n backward blocks."""
    tiles, f32 = problem.tiles, jnp.float32
    grid = Grid(problem, jax.tree.map(like_of, x))
    arrays, specs = grid.inputs(x)
    o_shape = (*x.v.shape[:2], *x.v.shape[2:])
    outputs = [(laid_shape(o_shape, x.q.dtype), grid.heads(x.v.shape[3], True)), (like_of(x.state), grid.states())]
    if keep:
        each, of_state = tiles.forward_chunks // tiles.backward_chunks, x.state.shape[2:]
        shape = jax.ShapeDtypeStruct((grid.batch, grid.blocks, grid.num_heads, each, *of_state), f32)
        spec = grid.spec((None, None, grid.num_values, each, *of_state), lambda b, h, hv, i: (b, i, hv, 0, 0, 0))
        outputs.append((shape, spec))
    if problem.stats:
        shape = jax.ShapeDtypeStruct((grid.batch, grid.num_heads, grid.blocks, SUBLANES, LANES), f32)
        spec = grid.spec((None, grid.num_values, None, SUBLANES, LANES), lambda b, h, hv, i: (b, hv, i, 0, 0))
        outputs.append((shape, spec))
    kernel = partial(_forward_kernel, problem, grid, keep)
    o, final, *extra = grid.call(kernel, kernel_name(problem, x, "forward"), [x.state, *arrays], [grid.states(), *specs], outputs)
    sums = None
    if problem.stats:
        sums = jnp.swapaxes(extra[-1][..., :3, : grid.chunks], 3, 4).reshape(grid.batch, grid.num_heads, -1, 3)
    return token_major(o, o_shape), final, sums, extra[0] if keep else None


def _backward_kernel(problem: Problem, grid: Grid, d_final: Any, entering: Any, d_o: Any, *refs: Any) -> None:
    x = grid.x
    num_gates = sum(g is not None for g in x.gates)
    num_inputs = 3 + num_gates + (x.tokens is not None)
    inputs, (d_q, d_k, d_v, *rest) = list(refs[:num_inputs]), refs[num_inputs:]
    d_gates, (d_state, *acc) = rest[:num_gates], rest[num_gates:]
    m, values = pl.program_id(3), range(grid.num_values)
    own = [m * grid.num_values + h for h in values]

    @pl.when(pl.program_id(2) == 0)
    def _start():
        for at in own:
            d_state[at] = d_final[at]

    loaded, rows = _load(grid, inputs)

    def block(loaded: list[list[Inputs]], states: list[Array]) -> tuple[list[list[Array]], list[Array]]:
        written = _advance(problem, loaded, rows, states)
        return [[w.o for w in head] for head in written], [head[-1].state for head in written]

    _, pullback = jax.vjp(block, loaded, [entering[h] for h in values])
    value_dim, key_dim = x.v.shape[3], x.q.shape[3]
    d_outputs = [[d_o[_at(d_o, h, grid.tokens(n), value_dim)].astype(jnp.float32) for n in range(grid.chunks)] for h in values]
    d_inputs, d_states = pullback((d_outputs, [d_state[at] for at in own]))
    for at, d in zip(own, d_states, strict=True):
        d_state[at] = d
    for key, chunks in enumerate(d_inputs):
        for n, d in enumerate(chunks):
            tokens = grid.tokens(n)
            for h, of_head in enumerate(d.heads, key * grid.members):
                d_v[_at(d_v, h, tokens, value_dim)] = of_head.v.astype(d_v.dtype)
                for ref, dg in zip(d_gates, [g for g in of_head.gates if g is not None], strict=True):
                    ref[(h, slice(n, n + 1)) if dg.shape[0] == 1 else _at(ref, h, tokens, key_dim)] = dg
            for ref, total, value in ((d_q, acc[:1], d.q), (d_k, acc[1:], d.k)):
                place = _at(ref, key, tokens, key_dim)
                if grid.steps == 1:
                    ref[place] = value.astype(ref.dtype)
                else:
                    _add_member(m, grid.steps, ref, place, total[0], tokens, value)


def _add_member(m: Array, steps: int, ref: Any, at: tuple[Any, ...], total: Any, tokens: slice, value: Array) -> None:
    """Sums `value` over the steps of a key head; the last one writes."""

    @pl.when(m == 0)
    def _first():
        total[tokens, :] = value

    @pl.when(m > 0)
    def _more():
        total[tokens, :] += value

    @pl.when(m == steps - 1)
    def _last():
        ref[at] = total[tokens, :].astype(ref.dtype)


def backward(problem: Problem, x: Operands, entering: Array, d_o: Array, d_final: Array) -> Operands:
    """The gradients of the operands."""
    grid = Grid(problem, jax.tree.map(like_of, x), reverse=True)
    arrays, specs = grid.inputs(x)
    of_state = x.state.shape[2:]
    each = entering.shape[3]
    at = lambda b, h, hv, i: (b, jax.lax.div(i, each), hv, jax.lax.rem(i, each), 0, 0)
    entering_spec = grid.spec((None, None, grid.num_values, None, *of_state), at)
    keys, values = grid.heads(x.q.shape[3], False), grid.heads(x.v.shape[3], True)
    gates = [g for g in x.gates if g is not None]
    gate_arrays = arrays[3 : 3 + len(gates)]
    outputs = [(laid_shape(y.shape, y.dtype), keys) for y in (x.q, x.k)] + [(laid_shape(x.v.shape, x.v.dtype), values)]
    outputs += [(like_of(g), spec) for g, spec in zip(gate_arrays, grid.gates(), strict=True)]
    outputs.append((like_of(x.state), grid.states()))
    scratch = [pltpu.VMEM((grid.size * grid.chunks, x.q.shape[3]), jnp.float32)] * (2 if grid.steps > 1 else 0)
    d_q, d_k, d_v, *d_gates, d_state = grid.call(
        partial(_backward_kernel, problem, grid),
        kernel_name(problem, x, "backward"),
        [d_final, entering, lay(d_o), *arrays],
        [grid.states(), entering_spec, values, *specs],
        outputs,
        scratch,
    )
    d_gates = [grid.from_rows(d) if g.ndim == 3 else token_major(d, g.shape) for g, d in zip(gates, d_gates, strict=True)]
    return Operands(
        token_major(d_q, x.q.shape),
        token_major(d_k, x.k.shape),
        token_major(d_v, x.v.shape),
        tuple(None if g is None else d_gates.pop(0) for g in x.gates),
        d_state,
        None,
    )
