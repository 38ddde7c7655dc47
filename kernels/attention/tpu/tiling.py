"""How attention for TPU is cut into tiles: their sizes, and a kernel's grid over those that are visited."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.attention.visits import Layout, Visits, plan_visits, segment_starts

Array = jax.Array

LANES = 128


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts its work, in tokens, multiples of 128. A short sequence gets smaller tiles."""

    block_q: int = 1024
    """Queries a tile."""
    block_kv: int = 1024
    """Keys a tile."""
    part_q: int = 1024
    """Queries of a part of a tile. Parts are worked off one after the other, so that the compiler can run the products of one beside the
    exponentials and sums of another."""
    part_kv: int = 1024
    """Keys of a part of a tile."""

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < LANES or size % LANES:
                raise ValueError(f"{name}={size} must be a positive multiple of {LANES}; use 128, 256, 512 or 1024")

    def fit(self, num_queries: int, num_keys: int) -> "Tile":
        """This tile, no longer than the sequences need."""
        block_q, block_kv = min(self.block_q, _round_up(num_queries, LANES)), min(self.block_kv, _round_up(num_keys, LANES))
        return replace(self, block_q=block_q, block_kv=block_kv)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tiles of each kernel."""

    forward: Tile
    query_gradients: Tile
    key_gradients: Tile
    """Of key and value gradients, and of what each key receives."""

    def fit(self, num_queries: int, num_keys: int) -> "Tiles":
        """These tiles, none longer than the sequences need."""
        return Tiles(**{name: tile.fit(num_queries, num_keys) for name, tile in vars(self).items()})


class Problem(NamedTuple):
    """What a kernel is specialised to."""

    layout: Layout
    tiles: Tiles
    scale: float
    sigmoid: bool
    stats: bool
    soft_cap: float | None = None
    block_size: int | None = None
    """Keys a block of those that the queries select, if they do."""


class Operands(NamedTuple):
    """What every kernel reads."""

    q: Array
    """[B, H, T, K]"""
    k: Array
    """[B, Hkv, S, K]"""
    v: Any
    """[B, Hkv, S, V], or None where only the weights matter."""
    bias: Array
    """[H] float32, added to the sigmoid's logits."""
    queries: Any
    """`Tokens`, int32 [B or 1, H or 1, T]"""
    keys: Any
    """`Tokens`, int32 [B or 1, 1, S]"""
    selected: Any = None
    """`SelectedBlocks`, or None."""


_Inputs = tuple[tuple[Array, str, int], ...]
"""Arrays [B or 1, any heads, ., .], the side they belong to and the axis of its tokens."""

_Outputs = tuple[tuple[int, Any], ...]
"""Width and dtype of arrays [B, H, width, T] or [B, Hkv, S, width]."""


class Tiling:
    """One kernel's blocks: pads the two sides to whole blocks and lays out the grid and its operands."""

    def __init__(self, problem: Problem, x: Operands, tile: Tile):
        block_q, block_kv = tile.block_q, tile.block_kv
        self.problem, self.x, self.tile, self.blocks = problem, x, tile, {"q": block_q, "kv": block_kv}
        self.batch, self.num_heads, self.num_kv_heads = *x.q.shape[:2], x.k.shape[1]
        self.tokens = {
            side: jax.tree.map(partial(self._pad, side=side, axis=2), both) for side, both in (("q", x.queries), ("kv", x.keys))
        }
        self.count = {side: both.positions.shape[2] // self.blocks[side] for side, both in self.tokens.items()}
        selected = x.selected
        if selected is not None:
            selected = replace(selected, indices=self._pad(selected.indices, "q", 1))
            self.bits = selected.bits(segment_starts(self.tokens["q"]), block_kv, self.count["kv"])
        else:
            self.bits = None
        self.by_query, self.by_key = plan_visits(
            problem.layout,
            self.tokens["q"],
            self.tokens["kv"],
            block_q,
            block_kv,
            keep_first=False,
            selected=selected,
            num_heads=self.num_heads,
        )

    def over_queries(self, kernel: Any, name: str, *, extra: _Inputs = (), outputs: _Outputs, scratch: list[Any]) -> list[Array]:
        """Runs a kernel over (batch, heads, query blocks, key blocks visited); outputs belong to the queries."""

        def where(b: Array, h: Array, i: Array, *rest: Any) -> tuple[Array, Array, dict[str, Array]]:
            step, table, _ = rest
            return b, h, {"q": i, "kv": self.by_query.lookup(table, b, h, i, step)[0]}

        grid = (self.batch, self.num_heads, self.count["q"], self.by_query.entries.shape[3])
        length = self.count["q"] * self.blocks["q"]
        shapes = [jax.ShapeDtypeStruct((self.batch, self.num_heads, n, length), dtype) for n, dtype in outputs]
        specs = [self._spec(shape.shape, "q", 3, where) for shape in shapes]
        return self._call(
            kernel, name, self.by_query, where, extra, out_shape=shapes, out_specs=specs, grid=grid, scratch=scratch
        )

    def over_keys(self, kernel: Any, name: str, *, extra: _Inputs = (), outputs: _Outputs, scratch: list[Any]) -> list[Array]:
        """Likewise over (batch, key heads, key blocks, heads of the group, query blocks visited); outputs belong to the keys."""
        group = self.num_heads // self.num_kv_heads

        def where(b: Array, h: Array, j: Array, *rest: Any) -> tuple[Array, Array, dict[str, Array]]:
            member, step, table, _ = rest
            head = h * group + member
            return b, head, {"q": self.by_key.lookup(table, b, head, j, step)[0], "kv": j}

        grid = (self.batch, self.num_kv_heads, self.count["kv"], group, self.by_key.entries.shape[3])
        length = self.count["kv"] * self.blocks["kv"]
        shapes = [jax.ShapeDtypeStruct((self.batch, self.num_kv_heads, length, n), dtype) for n, dtype in outputs]
        specs = [self._spec(shape.shape, "kv", 2, where) for shape in shapes]
        return self._call(kernel, name, self.by_key, where, extra, out_shape=shapes, out_specs=specs, grid=grid, scratch=scratch)

    def _call(
        self, kernel: Any, name: str, visits: Visits, where: Any, extra: _Inputs, *, out_shape, out_specs, grid, scratch
    ) -> list[Array]:
        x = self.x
        tokens: Any = tuple((both.stacked(), side, 3) for side, both in self.tokens.items())  # [B, H or 1, 2, T]
        values = () if x.v is None else ((x.v, "kv", 2),)
        inputs = ((x.q, "q", 2), (x.k, "kv", 2), *values, *extra)
        inputs = tuple((self._pad(array, side, axis), side, axis) for array, side, axis in inputs) + tokens
        if self.bits is not None:
            inputs += ((self.bits, "q", 4),)
        semantics: Any = ("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)
        return pl.pallas_call(
            partial(kernel, self.problem, self.tile, visits),
            name=name,
            out_shape=out_shape,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=grid,
                in_specs=[self._spec(array.shape, side, axis, where) for array, side, axis in inputs],
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        )(visits.flat(), x.bias, *(array for array, _, _ in inputs))

    def _pad(self, x: Array, side: str, axis: int) -> Array:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, -x.shape[axis] % self.blocks[side])
        return jnp.pad(x, padding)

    def _spec(self, shape: tuple[int, ...], side: str, axis: int, where: Any) -> pl.BlockSpec:
        """The blocks of an array [B or 1, any heads, ., .] along its token axis (bits: of both sides); groups of heads share."""

        def index(*at: Any) -> tuple[Any, ...]:
            b, h, blocks = where(*at)
            b, h = b if shape[0] > 1 else 0, jax.lax.div(h, self.num_heads // shape[1]) if shape[1] > 1 else 0
            if axis == 4:
                return b, h, blocks["kv"], 0, blocks["q"]
            return (b, h, blocks[side], 0) if axis == 2 else (b, h, 0, blocks[side])

        size = self.blocks[side]
        if axis == 4:
            return pl.BlockSpec((1, 1, 1, 1, size), index)
        return pl.BlockSpec((1, 1, size, shape[3]) if axis == 2 else (1, 1, shape[2], size), index)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
