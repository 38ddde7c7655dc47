"""How the TPU kernels of the linear recurrences cut their operands: tiles, the grid, and heads as it reads them; see `tpu_driver`."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.costs import cost
from plait.kernels.recurrence.tpu_chunk import BlockFunction

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
    forward_heads: int = 1
    """Value heads a grid step of the forward kernel, or the most below that divide the call's; see `heads_a_step`."""
    backward_heads: int = 1
    """The same of the backward kernel."""

    def __post_init__(self) -> None:
        if self.chunk_size not in (16, 32, 64, 128):
            raise ValueError(f"tiles.chunk_size={self.chunk_size} must be a power of two from 16 to 128; use 128")
        if self.backward_chunks < 1 or self.forward_chunks % self.backward_chunks or self.forward_chunks < 1:
            raise ValueError(
                f"tiles.backward_chunks={self.backward_chunks} must be positive and divide "
                f"tiles.forward_chunks={self.forward_chunks}; use 1"
            )
        for name in ("forward_heads", "backward_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"tiles.{name}={getattr(self, name)} must be positive; use 1")

    def fit(self, length: int) -> "Tiles":
        """These tiles, none longer than a sequence needs."""
        chunk_size = max(min(self.chunk_size, 1 << (length - 1).bit_length()), MIN_TOKENS)
        chunks = -(-length // chunk_size)
        backward = min(self.backward_chunks, chunks)
        return Tiles(
            chunk_size=chunk_size,
            forward_chunks=backward * min(self.forward_chunks // self.backward_chunks, -(-chunks // backward)),
            backward_chunks=backward,
            forward_heads=self.forward_heads,
            backward_heads=self.backward_heads,
        )


class Problem(NamedTuple):
    """What the kernels are specialised to."""

    block: BlockFunction
    tiles: Tiles
    scale: float
    full: bool
    stats: bool
    l2_norm_eps: float | None = None


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


def heads_a_step(num_qk_heads: int, num_heads: int, limit: int) -> tuple[int, int]:
    """The key heads of a grid step and the value heads of each, together at most `limit` value heads.

    A step takes several value heads of a key head, and where all of them fit, several key heads.
    """
    group = num_heads // num_qk_heads
    return _divisor(num_qk_heads, limit // group), _divisor(group, limit)


class Grid:
    """The blocks of one kernel, forwards or in reverse.

    A step takes `chunks` chunks of `keys` key heads with `members` value heads of each; `steps` steps take a key head's value heads in turn.
    """

    def __init__(self, problem: Problem, x: Operands, reverse: bool = False):
        tiles = problem.tiles
        self.size, self.x, self.reverse = tiles.chunk_size, x, reverse
        self.chunks = tiles.backward_chunks if reverse else tiles.forward_chunks
        self.batch, self.length, self.num_qk_heads = x.q.shape[:3]
        self.num_heads = x.v.shape[2]
        self.group = self.num_heads // self.num_qk_heads
        self.blocks = self.length // (self.size * self.chunks)
        limit = tiles.backward_heads if reverse else tiles.forward_heads
        self.keys, self.members = heads_a_step(self.num_qk_heads, self.num_heads, limit)
        self.num_values = self.keys * self.members
        self.steps = self.group // self.members
        self.shape = (self.batch, self.num_qk_heads // self.keys, self.blocks, self.steps)

    def spec(self, shape: tuple[int | None, ...], index: Any) -> pl.BlockSpec:
        """`index(batch, keys, values, block)` gives the block's place, in blocks of `keys` key heads and `num_values` value heads."""
        place = lambda i: self.blocks - 1 - i if self.reverse else i
        return pl.BlockSpec(shape, lambda b, h, i, m: index(b, h, h * self.steps + m, place(i)))

    def heads(self, width: int, of_values: bool) -> pl.BlockSpec:
        """Blocks [tokens, heads width] or [heads, tokens, width] of an array that `lay` laid out."""
        tokens, heads = self.size * self.chunks, self.num_values if of_values else self.keys
        pick = lambda h, hv: hv if of_values else h
        if width % LANES == 0:
            return self.spec((None, tokens, heads * width), lambda b, h, hv, i: (b, i, pick(h, hv)))
        return self.spec((None, heads, tokens, width), lambda b, h, hv, i: (b, pick(h, hv), i, 0))

    def states(self) -> pl.BlockSpec:
        """All states [keys group, V, K] of the key heads."""
        return self.spec((None, self.keys * self.group, *self.x.state.shape[2:]), lambda b, h, hv, i: (b, h, 0, 0))

    def rows(self) -> pl.BlockSpec:
        """Blocks [values, chunks, C] of [B, Hv, blocks, chunks, C]."""
        return self.spec((None, self.num_values, None, self.chunks, self.size), lambda b, h, hv, i: (b, hv, i, 0, 0))

    def gates(self) -> list[pl.BlockSpec]:
        """The gates that there are."""
        return [self.rows() if g.ndim == 3 else self.heads(g.shape[3], True) for g in self.x.gates if g is not None]

    def tokens(self, n: int) -> slice:
        """Chunk n in a block."""
        return slice(n * self.size, (n + 1) * self.size)

    def inputs(self, x: Operands) -> tuple[list[Array], list[pl.BlockSpec]]:
        """q, k, v, the gates, and the tokens or nothing."""
        arrays = [lay(x.q), lay(x.k), lay(x.v)]
        specs = [self.heads(x.q.shape[3], False)] * 2 + [self.heads(x.v.shape[3], True), *self.gates()]
        arrays += [self.to_rows(g) if g.ndim == 3 else lay(g) for g in x.gates if g is not None]
        if x.tokens is not None:
            arrays.append(x.tokens.reshape(self.batch, 3, self.blocks, self.chunks, self.size))
            specs.append(self.spec((None, 3, None, self.chunks, self.size), lambda b, h, hv, i: (b, 0, i, 0, 0)))
        return arrays, specs

    def operands(self, arrays: list[Array], state: Array) -> Operands:
        """The inverse of `inputs`."""
        like, left = self.x, iter(arrays)
        q, k, v = (token_major(next(left), y.shape) for y in (like.q, like.k, like.v))
        gates = tuple(
            None if g is None else self.from_rows(next(left)) if g.ndim == 3 else token_major(next(left), g.shape)
            for g in like.gates
        )
        return Operands(q, k, v, gates, state, None if like.tokens is None else next(left).reshape(like.tokens.shape))

    def to_rows(self, g: Array) -> Array:
        """[B, T, H] to [B, H, blocks, chunks, C]."""
        return jnp.swapaxes(g, 1, 2).reshape(self.batch, self.num_heads, self.blocks, self.chunks, self.size)

    def from_rows(self, g: Array) -> Array:
        """The inverse of `to_rows`."""
        return jnp.swapaxes(g.reshape(self.batch, self.num_heads, self.length), 1, 2)

    def call(self, kernel: Any, name: str, arrays: list[Any], in_specs: list[Any], outputs: list[Any], scratch: Any = ()) -> Any:
        """Runs a kernel; `outputs` are pairs of shape and spec."""
        semantics: Any = ("parallel", "parallel", "arbitrary", "arbitrary")
        *_, value_dim, key_dim = self.x.state.shape
        product = 2 * self.batch * self.length * self.num_heads
        flops = product * (2 * key_dim * value_dim + self.size * (key_dim + value_dim))  # the state and the chunk's scores
        if len(self.x.gates) > 1:
            flops += product * (key_dim * value_dim + self.size * (key_dim + value_dim))  # what is erased
        results = [shape for shape, _ in outputs]
        return pl.pallas_call(
            kernel,
            name=name,
            grid=self.shape,
            in_specs=in_specs,
            out_specs=[spec for _, spec in outputs],
            out_shape=results,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
            cost_estimate=cost((*arrays, *results), flops=flops * (2 if self.reverse else 1)),
        )(*arrays)


def kernel_name(problem: Problem, x: Operands, which: str) -> str:
    """Of a kernel, as profiles and compiled programs have it."""
    by_channel = any(g is not None and g.ndim == 4 for g in x.gates)
    return f"{problem.block.__name__}{'_by_channel' if by_channel else ''}_{which}"


def _divisor(number: int, limit: int) -> int:
    """The largest divisor up to `limit`, at least 1."""
    return max(n for n in range(1, max(min(number, limit), 1) + 1) if number % n == 0)


def lay(x: Array) -> Array:
    """[B, T, H, K] as the kernels read it: [B, T, H K] where a head is whole lanes, else [B, H, T, K]."""
    if x.shape[3] % LANES == 0:
        return x.reshape(*x.shape[:2], -1)
    return jnp.swapaxes(x, 1, 2)


def laid_shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lay, jax.ShapeDtypeStruct(shape, dtype))


def token_major(x: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `lay`."""
    return x.reshape(shape) if x.ndim == 3 else jnp.swapaxes(x, 1, 2)


def like_of(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
