"""How attention for TPU is cut into tiles: their sizes, and a kernel's grid over those that are visited."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.attention.tpu import carried
from plait.kernels.attention.tpu.bands import banded_edges
from plait.kernels.attention.tpu.edges import CELL, FIRST_EDGE, PARTLY, WHOLLY, Cells, Edges, Sight
from plait.kernels.attention.tpu.size import least
from plait.kernels.attention.tpu.steps import Steps, most_steps, plan_steps
from plait.kernels.attention.visits import FULL, Layout, tile_kinds
from plait.kernels.costs import cost
from plait.kernels.shapes import padded

Array = jax.Array

LANES, SUBLANES = 128, 8


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
    edge_q: int = 1024
    """The most queries of a part of a tile of which order hides some."""
    edge_kv: int = 128
    """Keys of a part of such a tile."""
    largest: int = 1024
    """The most tokens on either side of the squares that may take its place where keys are the queries' own."""
    step: int = 18
    """Cells whose cycles a tile costs besides: the grid, and waits of the first and last parts."""

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if name != "step" and (size < LANES or size % LANES):
                raise ValueError(f"{name}={size} must be a positive multiple of {LANES}; use 128, 256, 512 or 1024")

    def fit(self, num_queries: int, num_keys: int) -> "Tile":
        """This tile, no longer than the sequences need."""
        block_q, block_kv = min(self.block_q, rounded_up(num_queries, LANES)), min(self.block_kv, rounded_up(num_keys, LANES))
        return replace(self, block_q=block_q, block_kv=block_kv)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tiles of each kernel."""

    forward: Tile
    gradients: Tile
    """Of all gradients, and of what each key receives."""
    mass_by_product: bool = False
    """The product with the values adds the weights up too, as they are rounded for it: where it has room, and additions are what a part takes
    longest for."""
    sums_by_key_column: bool = False
    """Gradients of keys and values are summed transposed: products whose columns are keys fill a matrix unit of 256, while those whose columns
    are 128 channels fill half of it."""

    def sized(self, layout: Layout) -> "Tiles":
        """These tiles, of the size that has the least work under a layout."""

        def sized(tile: Tile) -> Tile:
            block_q, block_kv = least(layout, (tile.block_q, tile.block_kv), largest=tile.largest, step=tile.step)
            return replace(tile, block_q=block_q, block_kv=block_kv)

        return replace(self, forward=sized(self.forward), gradients=sized(self.gradients))

    def fit(self, num_queries: int, num_keys: int) -> "Tiles":
        """These tiles, none longer than the sequences need."""
        fit = lambda tile: tile.fit(num_queries, num_keys)
        return replace(self, forward=fit(self.forward), gradients=fit(self.gradients))


class Problem(NamedTuple):
    """What a kernel is specialised to."""

    layout: Layout
    tiles: Any
    """How it is cut: `Tiles`, or `plait.kernels.attention.tpu.cut.Cut` where queries select blocks."""
    scale: float
    sigmoid: bool
    stats: bool
    soft_cap: float | None = None

    @property
    def unit(self) -> float:
        """Of the logits that a kernel keeps: they are q . k, or what is capped over the cap."""
        return self.scale if self.soft_cap is None else self.soft_cap

    @property
    def mass_by_product(self) -> bool:
        """As `Tiles` say."""
        return self.tiles.mass_by_product

    @property
    def sums_by_key_column(self) -> bool:
        """As `Tiles` say."""
        return self.tiles.sums_by_key_column


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


class Part(NamedTuple):
    """Some queries of a tile that meet some of its keys: a kernel computes one rectangle after the other."""

    queries: slice
    cells: Cells
    """What is visible of each CELL keys to each CELL queries."""


class Course(NamedTuple):
    """How one kernel goes through its work."""

    problem: Problem
    tile: Tile
    edges: Edges
    steps: Steps
    group: int
    """Query heads of a key head."""

    def parts(self, kind: int) -> list[tuple[slice, list[Part]]]:
        """Keys, and the parts of them that a tile of a kind computes: all of it, but for what order hides."""
        if kind >= FIRST_EDGE:
            return edge_parts(*self.edges.shown(kind), self.tile)
        tile = self.tile
        keys, queries = cuts(0, tile.block_kv, tile.part_kv), cuts(0, tile.block_q, tile.part_q)
        if len(keys) == len(queries) == 1 and tile.block_q > LANES:  # parts overlap
            queries = cuts(0, tile.block_q, rounded_up(tile.block_q // 2, LANES))
        cells = [[WHOLLY if kind == FULL else PARTLY] * (tile.block_q // CELL)] * (tile.block_kv // CELL)
        return [(at, [Part(some, cells_of(cells, at, some)) for some in queries]) for at in keys]

    def groups(self, parts: Sequence[Part]) -> list[list[int]]:
        """The numbers of parts in order, small ones in groups of no more cells than half a part of a tile that is wholly visible has: one of
        them alone is too little to fill the units."""
        most, filled, found = self.tile.part_q * self.tile.part_kv // (2 * CELL**2), 0, list[list[int]]()
        for n, part in enumerate(parts):
            size = len(part.cells) * len(part.cells[0])
            if not found or filled + size > most:
                found.append([])
                filled = 0
            found[-1].append(n)
            filled += size
        return found


def edge_parts(cells: Cells, several: bool, tile: Tile) -> list[tuple[slice, list[Part]]]:
    """Keys, and the parts of them that are computed where order shows these cells, of one segment or of several.

    Keys that many queries meet stand beside those that few do: then parts that wait for one another, as those of the same queries do, stand
    apart.
    """
    found = []
    sights = [[PARTLY if several and state else state for state in row] for row in cells]
    for keys in cuts(0, tile.block_kv, tile.edge_kv):
        shown = [any(states) for states in zip(*cells[keys.start // CELL : keys.stop // CELL], strict=True)]
        if parts := [
            Part(at, cells_of(sights, keys, at))
            for low, high in _runs(shown)
            for at in cuts(low * CELL, high * CELL, tile.edge_q)
        ]:
            found.append((keys, parts))
    found.sort(key=lambda of: -sum(part.queries.stop - part.queries.start for part in of[1]))
    return [found[n // 2 if n % 2 == 0 else len(found) - 1 - n // 2] for n in range(len(found))]


def cuts(start: int, stop: int, size: int) -> list[slice]:
    """From start to stop in pieces of a size, of which the last may be shorter."""
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def cells_of(cells: Sequence[Sequence[Sight]], keys: slice, queries: slice) -> Cells:
    """Those of some tokens."""
    rows = cells[keys.start // CELL : keys.stop // CELL]
    return tuple(tuple(row[queries.start // CELL : queries.stop // CELL]) for row in rows)


def _runs(shown: list[bool]) -> list[tuple[int, int]]:
    """Where stretches of True begin and end."""
    ends = list(accumulate((len(list(run)) for _, run in groupby(shown)), initial=0))
    return [(low, high) for low, high in pairwise(ends) if shown[low]]


class Tiling:
    """One kernel's blocks: pads the two sides to whole blocks and lays out the grid and its operands.

    Args:
      columns: what a query and a key have of them in all products of the kernel.
    """

    def __init__(self, problem: Problem, x: Operands, tile: Tile, columns: int):
        block_q, block_kv = tile.block_q, tile.block_kv
        self.problem, self.x, self.tile, self.columns = problem, x, tile, columns
        self.blocks = {"q": block_q, "kv": block_kv}
        self.batch, self.num_heads, self.num_kv_heads = *x.q.shape[:2], x.k.shape[1]
        self.tokens = {
            side: jax.tree.map(partial(self._pad, side=side, axis=2), both) for side, both in (("q", x.queries), ("kv", x.keys))
        }
        self.count = {side: both.positions.shape[2] // self.blocks[side] for side, both in self.tokens.items()}
        self.edges: Edges = banded_edges(problem.layout, block_q, block_kv)
        self.kinds = tile_kinds(
            problem.layout,
            self.tokens["q"],
            self.tokens["kv"],
            block_q,
            block_kv,
            keep_first=False,
            masked=(self.edges.kinds, self.edges.of_several),
        )
        self.most = most_steps(problem.layout, block_q, block_kv)

    def over_queries(self, kernel: Any, name: str, *, extra: _Inputs = (), outputs: _Outputs, scratch: list[Any]) -> list[Array]:
        """Runs a kernel over (batch, heads, tiles visited), one block of queries after the other; outputs belong to the queries."""
        steps = plan_steps(self.kinds[:, :, :, None], self.most[0])

        def where(b: Array, h: Array, step: Array, table: Array, _: Any) -> tuple[Array, Array, dict[str, Array]]:
            at = steps.read(table, b, h, step)
            return b, h, {"q": at.major, "kv": at.minor}

        grid = (self.batch, self.num_heads, steps.longest)
        length = self.count["q"] * self.blocks["q"]
        shapes = [jax.ShapeDtypeStruct((self.batch, self.num_heads, n, length), dtype) for n, dtype in outputs]
        specs = [self._spec(shape.shape, "q", 3, where) for shape in shapes]
        return self._call(kernel, name, steps, where, extra, out_shape=shapes, out_specs=specs, grid=grid, scratch=scratch)

    def over_keys(
        self, kernel: Any, name: str, *, extra: _Inputs = (), outputs: _Outputs, scratch: list[Any], sums: int = 0
    ) -> list[Array]:
        """Likewise over (batch, key heads, tiles visited, heads of the group), one block of keys after the other; outputs belong to the
        keys. Where heads visit tiles of their own, those of a group stand in the list of tiles, and the last axis has length 1.

        Args:
          sums: the width of float32 sums [B, H, width, T] of the queries, which follow the outputs, and whose `Carried` has the last of the
            scratch memory; 0 is none.
        """
        group, heads = self.num_heads // self.num_kv_heads, self.kinds.shape[1]
        own = group if heads > 1 else 1  # heads of a group that are told apart in the list
        kinds = self.kinds.reshape(self.kinds.shape[0], -1, own, *self.kinds.shape[2:]).transpose(0, 1, 4, 2, 3)
        steps = plan_steps(kinds, self.most[1] * own)

        def where(b: Array, h: Array, step: Array, member: Array, table: Array, _: Any) -> tuple[Array, Array, dict[str, Array]]:
            at = steps.read(table, b, h, step)
            return b, h * group + (at.member if own > 1 else member), {"q": at.minor, "kv": at.major}

        grid = (self.batch, self.num_kv_heads, steps.longest, group // own)
        length = self.count["kv"] * self.blocks["kv"]
        shapes = [jax.ShapeDtypeStruct((self.batch, self.num_kv_heads, length, n), dtype) for n, dtype in outputs]
        specs = [self._spec(shape.shape, "kv", 2, where) for shape in shapes]
        far = []
        if sums:
            far = [jnp.zeros((self.batch, self.num_heads, sums, self.count["q"] * self.blocks["q"]), jnp.float32)]
            scratch = [*scratch, *carried.scratch(sums, self.blocks["q"])]
        return self._call(
            kernel, name, steps, where, extra, out_shape=shapes, out_specs=specs, grid=grid, scratch=scratch, sums=far
        )

    def _call(
        self, kernel: Any, name: str, steps: Steps, where: Any, extra: _Inputs, *, out_shape, out_specs, grid, scratch, sums=()
    ) -> list[Array]:
        x = self.x
        tokens: Any = tuple((both.stacked(), side, 3) for side, both in self.tokens.items())  # [B, H or 1, 2, T]
        values = () if x.v is None else ((x.v, "kv", 2),)
        inputs = ((x.q, "q", 2), (x.k, "kv", 2), *values, *extra)
        inputs = tuple((self._pad(array, side, axis), side, axis) for array, side, axis in inputs) + tokens
        semantics: Any = ("parallel",) * 2 + ("arbitrary",) * (len(grid) - 2)
        far = [pl.BlockSpec(memory_space=pl.ANY)] * len(sums)
        operands = (steps.entries.reshape(-1), x.bias, *(array for array, _, _ in inputs), *sums)
        results = [*out_shape, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sums)]
        pairs = self.batch * self.num_heads * self.edges.num_cells * CELL**2
        return pl.pallas_call(
            partial(kernel, Course(self.problem, self.tile, self.edges, steps, self.num_heads // self.num_kv_heads)),
            name=name,
            out_shape=results,
            input_output_aliases={2 + len(inputs) + i: len(out_shape) + i for i in range(len(sums))},
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=grid,
                in_specs=[*(self._spec(array.shape, side, axis, where) for array, side, axis in inputs), *far],
                out_specs=[*out_specs, *far],
                scratch_shapes=scratch,
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
            cost_estimate=cost((*operands, *results), flops=2 * pairs * self.columns, transcendentals=pairs),
        )(*operands)

    def _pad(self, x: Array, side: str, axis: int) -> Array:
        return padded(x, axis, self.blocks[side])

    def _spec(self, shape: tuple[int, ...], side: str, axis: int, where: Any) -> pl.BlockSpec:
        """The blocks of an array [B or 1, any heads, ., .] along its token axis; groups of heads share."""

        def index(*at: Any) -> tuple[Any, ...]:
            b, h, blocks = where(*at)
            b, h = b if shape[0] > 1 else 0, jax.lax.div(h, self.num_heads // shape[1]) if shape[1] > 1 else 0
            return (b, h, blocks[side], 0) if axis == 2 else (b, h, 0, blocks[side])

        size = self.blocks[side]
        return pl.BlockSpec((1, 1, size, shape[3]) if axis == 2 else (1, 1, shape[2], size), index)


def rounded_up(n: int, multiple: int) -> int:
    """n or the next multiple."""
    return -(-n // multiple) * multiple
