"""The way of a TPU kernel of attention through the tiles that queries have to do with, where they select blocks.

A step of the grid is a tile of queries of all heads that share keys and choice, or a tile of keys. In it a loop goes through the tiles of
the other side that some query has to do with, and copies what comes next from memory while it works on one: the next tile, or at the end of
the list the first of the next step. So few queries of many heads make one tall product, a tile that is visited costs its own work and no step
of a grid, and a list is no longer than a row of them.

What is summed for keys in the loop over the keys of some queries is in `key_sums`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.attention.tpu.cut import Cut
from plait.kernels.attention.tpu.edges import FIRST_EDGE
from plait.kernels.attention.tpu.key_sums import KeySums, Moving, Place, Resident, resident_bytes
from plait.kernels.attention.tpu.lists import TileList
from plait.kernels.attention.tpu.rectangles import Rectangle, Rectangles
from plait.kernels.attention.tpu.tiling import SUBLANES, Operands, Problem
from plait.kernels.attention.tpu.weights import staggered
from plait.kernels.attention.visits import FULL, MASKED, SKIP, segment_starts, tile_kinds
from plait.kernels.costs import cost
from plait.kernels.shapes import padded
from plait.kernels.target import core_memory, current

Array = jax.Array


class _Array(NamedTuple):
    """An operand, and where a tile finds its part of it."""

    value: Array
    block: tuple[int, ...]
    where: Callable[[Array, Array, Array, Array], tuple[Any, ...]]
    """Of the block, in blocks, for a row of the batch, a bundle of heads that share, a tile of queries and a tile of keys."""

    def of(self, ref: Any, *at: Array) -> Any:
        """The part of a reference to the whole array."""
        return ref.at[tuple(pl.ds(n * size, size) for n, size in zip(self.where(*at), self.block, strict=True))]


class Tile(NamedTuple):
    """Some queries [M, ...] of all heads of a bundle, one head after the other, and some keys [N, ...]."""

    bias: Any
    """Of the sigmoid, by query [1, M]; else a row of zeros."""
    q: Any
    k: Any
    v: Any
    d_o: Any
    rows: Any
    rectangles: Sequence[Rectangle]
    """All that may be visible."""


Stage = Callable[[int, Any], Any]
"""What is done with the rectangle of a number, of what the stage before it gave."""


class Work(NamedTuple):
    """What a kernel does at a step of its grid."""

    prepare: Callable[[Tile], None]
    """What is done ahead of all keys, of which the tile has none."""
    products: Callable[[Tile, slice, slice], Any]
    """The first stage, of some queries and keys of a tile: an array [N, M] in float32, or several."""
    rest: Callable[[Tile], tuple[Sequence[Stage], Callable[[], Sequence[Array]]]]
    """The other stages of a tile's rectangles, and what these add in the end to the sums of the tile's keys [N, .]."""
    finish: Callable[[Any], None]
    """What is written at the end, given the sigmoid's bias of the queries of the grid."""


class Walk:
    """The operands of one kernel, its grids and its way through the tiles.

    Args:
      x: what every kernel reads.
      columns: what a query and a key have of them in all products of this one.
      extra: what this one reads besides, of the queries: d_o [B, H, T, V], rows [B, H, R, T].
    """

    def __init__(self, problem: Problem, x: Operands, columns: int, *, forward: bool = False, **extra: Array):
        self.problem, self.bias, self.cut = problem, x.bias, problem.tiles
        cut: Cut = problem.tiles
        self.batch, self.num_bundles, self.num_kv_heads = x.q.shape[0], x.q.shape[1] // cut.heads, x.k.shape[1]
        queries, keys = (
            jax.tree.map(lambda a, size=size: padded(a, 2, size), both)
            for both, size in ((x.queries, cut.queries), (x.keys, cut.keys))
        )
        selected = jax.tree.map(lambda a: padded(a, 1, cut.queries), x.selected)
        choices = selected.indices.shape[2]
        each = min(x.selected.indices.shape[3] * cut.block_size, x.k.shape[2])  # keys of a query, if those of a tile choose alike
        self.pairs, self.columns = self.batch * x.q.shape[1] * x.q.shape[2] * each, columns
        self.num_queries, self.num_keys = queries.positions.shape[2] // cut.queries, keys.positions.shape[2] // cut.keys
        self.rectangles = Rectangles.under(problem, forward=forward)
        edge = self.rectangles.edge
        kinds = tile_kinds(
            problem.layout,
            queries,
            keys,
            cut.queries,
            cut.keys,
            keep_first=False,
            selected=selected,
            num_heads=choices,
            choice_alone=FULL,
            masked=(MASKED if edge is None else np.where(edge.kinds == FIRST_EDGE, FIRST_EDGE, MASKED), MASKED),
        )
        self.kinds = jnp.repeat(kinds, self.num_bundles // choices, axis=1)  # [B, bundles, NQ, NK]

        def of_queries(name: str, value: Array) -> _Array:
            if name == "rows":
                return _Array(
                    padded(value, 3, cut.queries), (1, cut.heads, value.shape[2], cut.queries), lambda b, c, i, j: (b, c, 0, i)
                )
            return _Array(
                padded(value, 2, cut.queries), (1, cut.heads, cut.queries, value.shape[3]), lambda b, c, i, j: (b, c, i, 0)
            )

        def of_keys(value: Array) -> _Array:
            each = self.num_bundles // self.num_kv_heads
            return _Array(
                padded(value, 2, cut.keys), (1, 1, cut.keys, value.shape[3]), lambda b, c, i, j: (b, jax.lax.div(c, each), j, 0)
            )

        one = lambda b: b if queries.positions.shape[0] > 1 else 0
        bits = selected.bits(segment_starts(problem.layout, queries, keys, selected), cut.keys, self.num_keys)  # [B, Hs, NK, T]
        bits = padded(bits, 2, SUBLANES).reshape(*bits.shape[:2], -1, SUBLANES, bits.shape[3])  # as it lies in memory
        self.of_queries = {name: of_queries(name, value) for name, value in {"q": x.q, **extra}.items()}
        self.of_queries["query_tokens"] = _Array(queries.stacked(), (1, 1, 2, cut.queries), lambda b, c, i, j: (one(b), 0, 0, i))
        self.of_keys = {name: of_keys(value) for name, value in (("k", x.k), ("v", x.v)) if value is not None}
        key_tokens = keys.stacked().reshape(-1, 2, self.num_keys, cut.keys).swapaxes(1, 2)  # [B or 1, NK, 2, N]
        self.of_keys["key_tokens"] = _Array(key_tokens, (1, 1, 2, cut.keys), lambda b, c, i, j: (one(b), j, 0, 0))
        self.bits = _Array(
            bits,
            (1, 1, 1, SUBLANES, cut.queries),
            lambda b, c, i, j: (b, jax.lax.div(c, self.num_bundles // choices), jax.lax.div(j, SUBLANES), 0, i),
        )

    def over_queries(
        self,
        begin: Callable[..., Work],
        name: str,
        *,
        outputs: list[tuple[int, Any]],
        scratch: list[Any],
        sums: int = 0,
    ) -> list[Array]:
        """Runs a kernel over (batch, key heads, their bundles' tiles of queries); outputs [B, H, width, T] belong to the queries.

        Args:
          begin: makes the kernel's work of references to its outputs and its scratch memory.
          sums: width of float32 sums of the keys, by tile of keys [B, Hkv, NK, keys, width], with `Problem.sums_by_key_column`
            [B, Hkv, NK, width, keys], which follow the outputs; 0 is none.
        """
        length, cut, each = self.num_queries * self.cut.queries, self.cut, self.num_bundles // self.num_kv_heads
        kinds = self.kinds.reshape(self.batch, self.num_kv_heads, -1, self.num_keys)

        def at(b: Array, h: Array, n: Array, entry: Array) -> tuple[Array, Array, Array, Array]:
            return b, h * each + jax.lax.div(n, self.num_queries), jax.lax.rem(n, self.num_queries), entry

        def where(b: Array, h: Array, n: Array, _: Any) -> tuple[Array, Any, int, Array]:
            b, bundle, i, _ = at(b, h, n, n)
            return b, bundle, 0, i

        return self._call(
            begin,
            name,
            kinds,
            at,
            self.of_queries,
            self.of_keys,
            fetched=cut.visited,
            out_shape=[
                jax.ShapeDtypeStruct((self.batch, self.num_bundles * cut.heads, n, length), dtype) for n, dtype in outputs
            ],
            out_specs=[pl.BlockSpec((1, cut.heads, n, cut.queries), where) for n, _ in outputs],
            scratch=scratch,
            sums=sums,
        )

    def over_keys(
        self, begin: Callable[..., Work], name: str, *, outputs: list[tuple[int, Any]], scratch: list[Any]
    ) -> list[Array]:
        """Likewise over (batch, bundles, tiles of keys); each bundle has outputs of its own, [B, bundles, S, width]."""
        length = self.num_keys * self.cut.keys
        return self._call(
            begin,
            name,
            jnp.swapaxes(self.kinds, 2, 3),
            lambda b, c, j, entry: (b, c, entry, j),
            self.of_keys,
            self.of_queries,
            fetched=1,
            out_shape=[jax.ShapeDtypeStruct((self.batch, self.num_bundles, length, n), dtype) for n, dtype in outputs],
            out_specs=[pl.BlockSpec((1, 1, self.cut.keys, n), lambda b, c, j, _: (b, c, j, 0)) for n, _ in outputs],
            scratch=scratch,
            sums=0,
        )

    def _call(self, begin, name, kinds, at, held, streamed, *, fetched, out_shape, out_specs, scratch, sums) -> list[Array]:
        """`at(b, h, n, entry)` gives row, bundle, tile of queries and tile of keys for a step of the grid and an entry of its list; a visit
        fetches `fetched` of these. `kinds` are [B, ., ., entries] over the grid."""
        streamed = streamed | {"bits": self.bits}
        table, steps = TileList.table(kinds, fetched), kinds.shape[2]
        tile = (sums, self.cut.keys) if self.problem.sums_by_key_column else (self.cut.keys, sums)
        chip = current()
        overlap = chip is not None and chip.cores == 1
        in_order = bool(sums) or overlap or kinds.shape[0] * kinds.shape[1] > 1  # else two cores share the steps of the one head
        stay = resident_bytes(self.cut.heads * self.cut.queries, self.num_keys, tile, core_memory()) if sums else 0
        total = jax.ShapeDtypeStruct((self.batch, self.num_kv_heads, self.num_keys, *tile), jnp.float32)
        come = [jnp.zeros_like(total)] if sums and not stay else []
        of_sums = Resident.scratch(self.num_keys, tile) if stay else Moving.scratch(tile, fetched) if sums else []

        def kernel(bias: Any, visits: Any, later: Any, *refs: Any) -> None:
            left = iter(refs)
            here, far = ({key: next(left) for key in names} for names in (held, streamed))
            for _ in come:
                next(left)  # the same memory as the sums'
            outs, totals = [next(left) for _ in out_shape], [next(left) for _ in range(bool(sums))]
            buffers, arrived = {key: next(left) for key in streamed}, next(left)
            sum_memory = [next(left) for _ in of_sums]
            b, h, tile = (pl.program_id(axis) for axis in range(3))
            mine, after = TileList(visits, tile, fetched), TileList(later, tile + 1, fetched)
            kinds, num_visits = self.rectangles.kinds(fetched), mine.visits
            work = begin(self.problem, outs, list(left))

            def place(n: Array, p: int, of: TileList = mine) -> tuple[Array, ...]:
                return at(b, h, of.step, of.entry(n, p) >> 2)

            def real(n: Array, p: int) -> Array:
                return (mine.entry(n, p) & 3) != SKIP

            def copies(n: Array, of: TileList = mine) -> list[Any]:
                moving = list(streamed.values()), list(far.values()), list(buffers.values()), arrived
                return [copy for p in range(fetched) for copy in _copies(*moving, (of.slot(n), p), place(n, p, of))]

            def parts(n: Array) -> dict[str, list[Array]]:
                """What is here of a visit, [heads, ., .] each; of what belongs to keys one after the other."""
                found = {key: [ref[0]] for key, ref in here.items()}
                return found | {
                    key: [buffer[mine.slot(n), p, 0] for p in range(fetched)] for key, buffer in buffers.items() if key != "bits"
                }

            def of_keys(n: Array, p: int) -> Place:
                row, bundle, _, tile = place(n, p)
                return Place(row, jax.lax.div(bundle, self.num_bundles // self.num_kv_heads), tile, real(n, p))

            key_sums: list[KeySums] = []
            if stay:
                key_sums.append(Resident(totals[0], sum_memory[0], sum_memory[1], of_keys, overlap))
            elif sums:
                key_sums.append(Moving(totals[0], sum_memory[0], sum_memory[1], sum_memory[2], of_keys, num_visits))

            def start(n: Array, of: TileList = mine) -> None:
                for copy in copies(n, of):
                    copy.start()

            def wait(n: Array) -> None:
                for copy in copies(n):
                    copy.wait()

            def start_next_step() -> None:
                if in_order:
                    pl.when((after.step < steps) & (after.visits > 0))(lambda: start(jnp.int32(0), after))

            def visit(n: Array, _: None) -> None:
                more = n + 1 < num_visits
                pl.when(more)(partial(start, n + 1))
                pl.when(~more)(start_next_step)
                wait(n)
                for x in key_sums:
                    x.enter(n)
                bundle = place(n, 0)[1]

                def of_kinds(kinds: tuple[int, ...]) -> None:
                    found = parts(n)
                    own = [jax.lax.rem(place(n, p)[3], SUBLANES) for p in range(fetched)]
                    bits = [buffers["bits"][mine.slot(n), p, 0, 0, 0, pl.ds(row, 1)] for p, row in enumerate(own)]
                    if fetched > 1:  # beyond the last tile of the list
                        bits = [jnp.where(real(n, p), x, 0) for p, x in enumerate(bits)]
                    queries, keys = found["query_tokens"][0][0], [tokens[0].T for tokens in found["key_tokens"]]
                    rectangles = self.rectangles.of(kinds, queries, keys, bits)
                    tile = self._tile(found, rectangles, self._bias(bias, bundle))
                    stages, added = work.rest(tile)
                    each = [[i] for i in range(len(rectangles))]
                    staggered(each, lambda i, _: work.products(tile, *rectangles[i][:2]), *stages)
                    for to, x in zip(key_sums, added(), strict=True):
                        for p in (p for p, kind in enumerate(kinds) if kind != SKIP):
                            at_keys = slice(p * self.cut.keys, (p + 1) * self.cut.keys)
                            to.add(n, p, x[:, at_keys] if self.problem.sums_by_key_column else x[at_keys])

                others: Any = True
                for some in kinds[:-1]:
                    these = others & self.rectangles.fit(some, [mine.entry(n, p) & 3 for p in range(fetched)])
                    pl.when(these)(partial(of_kinds, some))
                    others &= ~these
                pl.when(others)(partial(of_kinds, kinds[-1]))
                for x in key_sums:
                    x.leave(n)

            for x in key_sums:
                x.begin()
            not_yet = (tile == 0) | (not in_order)
            pl.when(not_yet & (num_visits > 0))(lambda: start(jnp.int32(0)))
            pl.when(num_visits == 0)(start_next_step)
            work.prepare(self._tile({key: [ref[0]] for key, ref in here.items()}))
            for x in key_sums:
                pl.when(num_visits > 0)(partial(x.enter, jnp.int32(-1)))
            _each(num_visits, visit)
            for x in key_sums:
                x.end()
            work.finish(self._bias(bias, at(b, h, tile, tile)[1]))

        operands = (
            self.bias,
            table,
            table,
            *(a.value for a in held.values()),
            *(a.value for a in streamed.values()),
            *come,
        )
        results = [*out_shape, *[total] * bool(sums)]
        across: Any = "arbitrary" if stay and overlap else "parallel"
        return pl.pallas_call(
            kernel,
            name=name,
            out_shape=results,
            input_output_aliases={3 + len(held) + len(streamed): len(out_shape)} if come else {},
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=kinds.shape[:3],
                in_specs=[
                    *(
                        pl.BlockSpec((1, 1, 1, *table.shape[3:]), listed, memory_space=pltpu.SMEM)
                        for listed in (
                            lambda b, h, n, _: (b, h, n, 0, 0),
                            lambda b, h, n, _: (b, h, jnp.minimum(n + 1, steps - 1), 0, 0),
                        )
                    ),
                    *(pl.BlockSpec(a.block, lambda b, h, n, _, a=a: a.where(*at(b, h, n, 0))) for a in held.values()),
                    *[pl.BlockSpec(memory_space=pl.ANY)] * (len(streamed) + len(come)),
                ],
                out_specs=[*out_specs, *[pl.BlockSpec(memory_space=pl.ANY)] * bool(sums)],
                scratch_shapes=[
                    *(pltpu.VMEM((2, fetched, *a.block), a.value.dtype) for a in streamed.values()),
                    pltpu.SemaphoreType.DMA((2, fetched, len(streamed))),
                    *of_sums,
                    *scratch,
                ],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=(across, across, "arbitrary" if in_order else "parallel"),
                vmem_limit_bytes=stay or None,
            ),
            cost_estimate=cost((*operands, *results), flops=2 * self.pairs * self.columns, transcendentals=self.pairs),
        )(*operands)

    def _tile(self, parts: dict[str, list[Array]], rectangles: Sequence[Rectangle] = (), bias: Any = None) -> Tile:
        """A tile of what a kernel holds and what it fetched, each [heads, ., .]; of what belongs to keys one after the other."""
        tall = lambda name: parts[name][0].reshape(-1, parts[name][0].shape[2]) if name in parts else None  # [heads * T, .]
        joined = lambda name: jnp.concatenate([x[0] for x in parts[name]], axis=0) if name in parts else None
        rows = jnp.concatenate(list(parts["rows"][0]), axis=1) if "rows" in parts else None
        return Tile(bias, tall("q"), joined("k"), joined("v"), tall("d_o"), rows, rectangles)

    def _bias(self, bias: Any, bundle: Array) -> Any:
        """[1, M], of the sigmoid; else 0."""
        if not self.problem.sigmoid:
            return jnp.zeros((1, self.cut.heads * self.cut.queries))
        heads = [jnp.full((1, self.cut.queries), bias[bundle * self.cut.heads + n]) for n in range(self.cut.heads)]
        return jnp.concatenate(heads, axis=1)


def _copies(
    arrays: list[_Array],
    far: list[Any],
    buffers: list[Any],
    semaphores: Any,
    at: tuple[Any, int],
    place: Any,
) -> list[Any]:
    """The copies of a tile's parts of arrays into the buffers, at a slot and one of the tiles there."""
    found = []
    for i, (array, ref, buffer) in enumerate(zip(arrays, far, buffers, strict=True)):
        found.append(pltpu.make_async_copy(array.of(ref, *place), buffer.at[at], semaphores.at[(*at, i)]))
    return found


def _each(count: Array, visit: Callable[[Array, None], None]) -> None:
    """Visits so many tiles."""
    jax.lax.fori_loop(0, count, visit, None)
