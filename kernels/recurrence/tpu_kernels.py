"""The two Pallas kernels of the linear recurrences on TPU, and how they cut their operands; see `tpu_driver`."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.recurrence.tpu_chunk import SUBLANES, BlockFunction, Bounds, Inputs, Written, column, iota

Array = jax.Array

LANES = 128

MIN_TOKENS = 16
"""Fewer tokens than this (decoding) fill too little of a chunk."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a sequence is cut."""

    chunk_size: int = 128
    """Tokens a chunk: a power of two, from 16 to 128."""
    forward_chunks: int = 8
    """Chunks a grid step of the forward kernel."""
    backward_chunks: int = 4
    """Chunks a grid step of the backward kernel; divides `forward_chunks`."""

    def __post_init__(self) -> None:
        if self.chunk_size not in (16, 32, 64, 128):
            raise ValueError(f"tiles.chunk_size={self.chunk_size} must be a power of two from 16 to 128; use 128")
        if self.backward_chunks < 1 or self.forward_chunks % self.backward_chunks or self.forward_chunks < 1:
            raise ValueError(
                f"tiles.backward_chunks={self.backward_chunks} must be positive and divide "
                f"tiles.forward_chunks={self.forward_chunks}; use 1"
            )

    def fit(self, length: int) -> "Tiles":
        """These tiles, none longer than a sequence needs."""
        chunk_size = max(min(self.chunk_size, 1 << (length - 1).bit_length()), MIN_TOKENS)
        chunks = -(-length // chunk_size)
        backward = min(self.backward_chunks, chunks)
        return Tiles(
            chunk_size=chunk_size,
            forward_chunks=backward * min(self.forward_chunks // self.backward_chunks, -(-chunks // backward)),
            backward_chunks=backward,
        )


class Problem(NamedTuple):
    """What the kernels are specialised to."""

    block: BlockFunction
    tiles: Tiles
    scale: float
    full: bool
    stats: bool


class Operands(NamedTuple):
    """What the kernels read; T is whole chunks."""

    q: Array
    """[B, T, Hqk, K]"""
    k: Array
    v: Array
    """[B, T, Hv, V]"""
    gates: tuple[Any, ...]
    """float32 [B, T, Hv] or [B, T, Hv, K] each, or None."""
    state: Array
    """float32 [B, Hv, V, K]"""
    tokens: Array | None
    """float32 [B, 3, T]: segment number, that of the token before the chunk, and 1 for real tokens; None is one segment."""


class _Grid:
    """The blocks of one kernel: `chunks` chunks a step, forwards or in reverse."""

    def __init__(self, problem: Problem, x: Operands, chunks: int, reverse: bool = False):
        self.size, self.chunks, self.x, self.reverse = problem.tiles.chunk_size, chunks, x, reverse
        self.batch, self.length, self.num_qk_heads = x.q.shape[:3]
        self.num_heads = x.v.shape[2]
        self.group = self.num_heads // self.num_qk_heads
        self.blocks = self.length // (self.size * chunks)
        self.shape = (self.batch, self.num_qk_heads, self.blocks, self.group)

    def spec(self, shape: tuple[int | None, ...], index: Any) -> pl.BlockSpec:
        """`index(batch, key head, value head, block)` gives the block's place."""
        place = lambda i: self.blocks - 1 - i if self.reverse else i
        return pl.BlockSpec(shape, lambda b, h, i, m: index(b, h, h * self.group + m, place(i)))

    def heads(self, width: int, of_values: bool) -> pl.BlockSpec:
        """Blocks [tokens, width] of an array that `_lay` laid out."""
        tokens = self.size * self.chunks
        pick = lambda h, hv: hv if of_values else h
        if width % LANES == 0:
            return self.spec((None, tokens, width), lambda b, h, hv, i: (b, i, pick(h, hv)))
        return self.spec((None, None, tokens, width), lambda b, h, hv, i: (b, pick(h, hv), i, 0))

    def states(self) -> pl.BlockSpec:
        """All states [group, V, K] of a key head."""
        return self.spec((None, self.group, *self.x.state.shape[2:]), lambda b, h, hv, i: (b, h, 0, 0))

    def rows(self) -> pl.BlockSpec:
        """Blocks [chunks, C] of [B, Hv, blocks, chunks, C]."""
        return self.spec((None, None, None, self.chunks, self.size), lambda b, h, hv, i: (b, hv, i, 0, 0))

    def gates(self) -> list[pl.BlockSpec]:
        """The gates that there are."""
        return [self.rows() if g.ndim == 3 else self.heads(g.shape[3], True) for g in self.x.gates if g is not None]

    def inputs(self) -> tuple[list[Array], list[pl.BlockSpec]]:
        """q, k, v, the gates, and the tokens or nothing."""
        x = self.x
        arrays = [_lay(x.q), _lay(x.k), _lay(x.v)]
        specs = [self.heads(x.q.shape[3], False)] * 2 + [self.heads(x.v.shape[3], True), *self.gates()]
        arrays += [self.to_rows(g) if g.ndim == 3 else _lay(g) for g in x.gates if g is not None]
        if x.tokens is not None:
            arrays.append(x.tokens.reshape(self.batch, 3, self.blocks, self.chunks, self.size))
            specs.append(self.spec((None, 3, None, self.chunks, self.size), lambda b, h, hv, i: (b, 0, i, 0, 0)))
        return arrays, specs

    def to_rows(self, g: Array) -> Array:
        """[B, T, H] to [B, H, blocks, chunks, C]."""
        return jnp.swapaxes(g, 1, 2).reshape(self.batch, self.num_heads, self.blocks, self.chunks, self.size)

    def from_rows(self, g: Array) -> Array:
        """The inverse of `to_rows`."""
        return jnp.swapaxes(g.reshape(self.batch, self.num_heads, self.length), 1, 2)

    def call(self, kernel: Any, name: str, arrays: list[Any], in_specs: list[Any], outputs: list[Any], scratch: Any = ()) -> Any:
        """Runs a kernel; `outputs` are pairs of shape and spec."""
        semantics: Any = ("parallel", "parallel", "arbitrary", "arbitrary")
        return pl.pallas_call(
            kernel,
            name=name,
            grid=self.shape,
            in_specs=in_specs,
            out_specs=[spec for _, spec in outputs],
            out_shape=[shape for shape, _ in outputs],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        )(*arrays)


def _lay(x: Array) -> Array:
    """[B, T, H, K] as the kernels read it: [B, T, H K] where a head is whole lanes, else [B, H, T, K]."""
    if x.shape[3] % LANES == 0:
        return x.reshape(*x.shape[:2], -1)
    return jnp.swapaxes(x, 1, 2)


def _laid_shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(_lay, jax.ShapeDtypeStruct(shape, dtype))


def _token_major(x: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_lay`."""
    return x.reshape(shape) if x.ndim == 3 else jnp.swapaxes(x, 1, 2)


_Rows = tuple[Array, ...] | None


def _load(problem: Problem, x: Operands, refs: list[Any], n: int) -> tuple[Inputs, _Rows]:
    """Chunk n of a block, and its token rows, from the refs of `_Grid.inputs`."""
    size = problem.tiles.chunk_size
    tokens = slice(n * size, (n + 1) * size)
    q, k, v, *rest = refs
    gates = []
    for g in x.gates:
        gates.append(None if g is None else rest.pop(0)[slice(n, n + 1) if g.ndim == 3 else tokens, :])
    rows = tuple(rest[0][r, n : n + 1] for r in range(3)) if rest else None
    q, k, v = (ref[tokens, :].astype(jnp.float32) for ref in (q, k, v))
    return Inputs(q, k, v, tuple(gates)), rows


def _real(x: Inputs, rows: _Rows) -> Inputs:
    """A chunk with zeros at padding, which thus is skipped."""
    if rows is None:
        return x
    row = rows[2] != 0
    real = column(rows[2]) != 0
    return jax.tree.map(lambda y: jnp.where(row if y.shape[0] == 1 else real, y, 0.0), x)


def _advance(problem: Problem, chunks: list[Inputs], rows: list[_Rows], state: Array) -> list[Written]:
    """What the chunks of a block give."""
    bounds = [None if row is None else Bounds.of(*row[:2]) for row in rows]
    written = problem.block(problem.full, [_real(x, row) for x, row in zip(chunks, rows, strict=True)], bounds, state)
    return [w._replace(o=problem.scale * w.o) for w in written]


def _sums(x: Inputs, written: Written) -> tuple[Array, Array, Array]:
    """[1, 1] each: the leaving state's squares, and the sums of |k| |u| and of -g."""
    total = lambda y: jnp.sum(jnp.sum(y, axis=0, keepdims=True), axis=1, keepdims=True)
    squares = lambda y: jnp.sum(y * y, axis=1, keepdims=True)
    g = x.gates[0]
    rate = jnp.zeros((1, 1), jnp.float32) if g is None else total(g) * (-1.0 / (1 if g.shape[0] == 1 else g.shape[1]))
    return total(written.state * written.state), total(jnp.sqrt(squares(x.k) * squares(written.values))), rate


def _forward_kernel(problem: Problem, x: Operands, chunks: int, keep: bool, initial: Any, *refs: Any) -> None:
    outputs = 2 + keep + problem.stats
    inputs, (o, final, *extra) = list(refs[:-outputs]), refs[-outputs:]
    m, size = pl.program_id(3), problem.tiles.chunk_size

    @pl.when(pl.program_id(2) == 0)
    def _start():
        final[m] = initial[m]

    loaded, rows = zip(*(_load(problem, x, inputs, n) for n in range(chunks)), strict=True)
    written = _advance(problem, list(loaded), list(rows), final[m])
    for n, state in enumerate([final[m], *(w.state for w in written[:-1])]):
        if keep and n % problem.tiles.backward_chunks == 0:
            extra[0][n // problem.tiles.backward_chunks] = state
    final[m] = written[-1].state
    for n, w in enumerate(written):
        o[n * size : (n + 1) * size, :] = w.o.astype(o.dtype)
    if problem.stats:
        collected = jnp.zeros((SUBLANES, LANES), jnp.float32)
        row, lane = iota(collected.shape, 0), iota(collected.shape, 1)
        for n, w in enumerate(written):
            for r, value in enumerate(_sums(_real(loaded[n], rows[n]), w)):
                collected = jnp.where((row == r) & (lane == n), value, collected)
        extra[-1][...] = collected


def forward(problem: Problem, x: Operands, *, keep: bool) -> tuple[Array, Array, Array | None, Array | None]:
    """o, the final state, the sums, and with `keep` the states [B, Hv, blocks, V, K] that enter the backward blocks."""
    tiles, f32 = problem.tiles, jnp.float32
    grid = _Grid(problem, x, tiles.forward_chunks)
    arrays, specs = grid.inputs()
    o_shape = (*x.v.shape[:2], *x.v.shape[2:])
    outputs = [(_laid_shape(o_shape, x.q.dtype), grid.heads(x.v.shape[3], True)), (_like(x.state), grid.states())]
    if keep:
        each, of_state = tiles.forward_chunks // tiles.backward_chunks, x.state.shape[2:]
        shape = jax.ShapeDtypeStruct((grid.batch, grid.num_heads, grid.blocks * each, *of_state), f32)
        outputs.append((shape, grid.spec((None, None, each, *of_state), lambda b, h, hv, i: (b, hv, i, 0, 0))))
    if problem.stats:
        shape = jax.ShapeDtypeStruct((grid.batch, grid.num_heads, grid.blocks, SUBLANES, LANES), f32)
        spec = grid.spec((None, None, None, SUBLANES, LANES), lambda b, h, hv, i: (b, hv, i, 0, 0))
        outputs.append((shape, spec))
    kernel = partial(_forward_kernel, problem, jax.tree.map(_like, x), grid.chunks, keep)
    name = f"{problem.block.__name__}_forward"
    o, final, *extra = grid.call(kernel, name, [x.state, *arrays], [grid.states(), *specs], outputs)
    sums = None
    if problem.stats:
        sums = jnp.swapaxes(extra[-1][..., :3, : grid.chunks], 3, 4).reshape(grid.batch, grid.num_heads, -1, 3)
    return _token_major(o, o_shape), final, sums, extra[0] if keep else None


def _backward_kernel(problem: Problem, x: Operands, chunks: int, d_final: Any, entering: Any, d_o: Any, *refs: Any) -> None:
    group = x.v.shape[2] // x.q.shape[2]
    num_gates = sum(g is not None for g in x.gates)
    num_inputs = 3 + num_gates + (x.tokens is not None)
    inputs, (d_q, d_k, d_v, *rest) = list(refs[:num_inputs]), refs[num_inputs:]
    d_gates, (d_state, *acc) = rest[:num_gates], rest[num_gates:]
    m, size = pl.program_id(3), problem.tiles.chunk_size

    @pl.when(pl.program_id(2) == 0)
    def _start():
        d_state[m] = d_final[m]

    loaded, rows = zip(*(_load(problem, x, inputs, n) for n in range(chunks)), strict=True)

    def block(loaded: list[Inputs], state: Array) -> tuple[list[Array], Array]:
        written = _advance(problem, loaded, list(rows), state)
        return [w.o for w in written], written[-1].state

    _, pullback = jax.vjp(block, list(loaded), entering[...])
    d_outputs = [d_o[n * size : (n + 1) * size, :].astype(jnp.float32) for n in range(chunks)]
    d_inputs, d_state[m] = pullback((d_outputs, d_state[m]))
    for n, d in enumerate(d_inputs):
        tokens = slice(n * size, (n + 1) * size)
        d_v[tokens, :] = d.v.astype(d_v.dtype)
        for ref, dg in zip(d_gates, [g for g in d.gates if g is not None], strict=True):
            ref[slice(n, n + 1) if dg.shape[0] == 1 else tokens, :] = dg
        for ref, total, value in ((d_q, acc[:1], d.q), (d_k, acc[1:], d.k)):
            if group == 1:
                ref[tokens, :] = value.astype(ref.dtype)
            else:
                _add_member(m, group, ref, total[0], tokens, value)


def _add_member(m: Array, group: int, ref: Any, total: Any, tokens: slice, value: Array) -> None:
    """Sums `value` over the value heads of a key head; the last one writes."""

    @pl.when(m == 0)
    def _first():
        total[tokens, :] = value

    @pl.when(m > 0)
    def _more():
        total[tokens, :] += value

    @pl.when(m == group - 1)
    def _last():
        ref[tokens, :] = total[tokens, :].astype(ref.dtype)


def backward(problem: Problem, x: Operands, entering: Array, d_o: Array, d_final: Array) -> Operands:
    """The gradients of the operands."""
    grid = _Grid(problem, x, problem.tiles.backward_chunks, reverse=True)
    arrays, specs = grid.inputs()
    of_state = x.state.shape[2:]
    entering_spec = grid.spec((None, None, None, *of_state), lambda b, h, hv, i: (b, hv, i, 0, 0))
    keys, values = grid.heads(x.q.shape[3], False), grid.heads(x.v.shape[3], True)
    gates = [g for g in x.gates if g is not None]
    gate_arrays = arrays[3 : 3 + len(gates)]
    outputs = [(_laid_shape(y.shape, y.dtype), keys) for y in (x.q, x.k)] + [(_laid_shape(x.v.shape, x.v.dtype), values)]
    outputs += [(_like(g), spec) for g, spec in zip(gate_arrays, grid.gates(), strict=True)]
    outputs.append((_like(x.state), grid.states()))
    scratch = [pltpu.VMEM((grid.size * grid.chunks, x.q.shape[3]), jnp.float32)] * (2 if grid.group > 1 else 0)
    d_q, d_k, d_v, *d_gates, d_state = grid.call(
        partial(_backward_kernel, problem, jax.tree.map(_like, x), grid.chunks),
        f"{problem.block.__name__}_backward",
        [d_final, entering, _lay(d_o), *arrays],
        [grid.states(), entering_spec, values, *specs],
        outputs,
        scratch,
    )
    d_gates = [grid.from_rows(d) if g.ndim == 3 else _token_major(d, g.shape) for g, d in zip(gates, d_gates, strict=True)]
    return Operands(
        _token_major(d_q, x.q.shape),
        _token_major(d_k, x.k.shape),
        _token_major(d_v, x.v.shape),
        tuple(None if g is None else d_gates.pop(0) for g in x.gates),
        d_state,
        None,
    )


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
