"""Cross entropy for Hopper (Mosaic GPU): no logit of the forward pass leaves the registers.

A block of threads has two warpgroups that compute, 64 tokens each, and one that copies parts of hidden and weight into a ring in shared
memory. The logits of 128 tokens and one tile of the vocabulary are summed over D by `wgmma` and then enter an online log-sum-exp, in
units of log 2; the target's logit is picked up on the way. Where tokens are few, several blocks share the vocabulary and their rows
are merged outside. The other kernel makes dz of a slice of the vocabulary in the same way; the rest of the gradients: `by_vocabulary`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels import gpu
from plait.kernels.costs import cost
from plait.kernels.cross_entropy.by_vocabulary import Kernels, Rows, Slope, cross_entropy_of
from plait.kernels.cross_entropy.call import CrossEntropyCall

Array = jax.Array

ROWS = 64
"""Tokens of a product that one warpgroup computes."""

COMPUTE = 2
"""Warpgroups that compute."""

TOKENS = COMPUTE * ROWS
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24

SPREAD = 132
"""Blocks that fill the chip."""

LOG2E = math.log2(math.e)
LN2 = math.log(2)
LOWEST = -1e30
"""In place of minus infinity, so that differences stay finite."""


class Tiles(NamedTuple):
    """Sizes of a tile, and tiles held ahead."""

    vocabulary: int = 256
    width: int = 64
    """Of the part of D that a step multiplies."""
    stages: int = 4


TILES = Tiles()
SLOPE_TILES = Tiles(stages=3)
CAPPED_SLOPE_TILES = Tiles(vocabulary=128)
"""With a soft cap the logits are needed to the end, beside dz."""


def unsupported(call: CrossEntropyCall) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    if reason := gpu.unavailable():
        return reason
    dtypes = {x.dtype.name for x in (call.hidden, call.weight)}
    if dtypes != {"bfloat16"}:
        return f"hidden and weight are {', '.join(sorted(dtypes))}, not bfloat16"
    return None


def cross_entropy(call: CrossEntropyCall) -> tuple[Array, Array]:
    """See `plait.kernels.cross_entropy`."""
    return cross_entropy_of(Kernels(forward, slopes), call)


def forward(hidden: Array, weight: Array, targets: Array, soft_cap: float | None) -> Rows:
    """lse and target logit, float32 [N], of hidden [N, D], weight [D, Vocab] and targets int32 [N]."""
    tiles, (num_tokens, vocabulary) = TILES, (hidden.shape[0], weight.shape[1])
    hidden, weight = _whole(hidden, TOKENS, tiles.width), _whole(weight, tiles.width, tiles.vocabulary)
    blocks, steps = hidden.shape[0] // TOKENS, weight.shape[1] // tiles.vocabulary
    splits = min(steps, max(1, SPREAD // blocks))
    span = -(-steps // splits)  # vocabulary tiles of a split
    splits = -(-steps // span)

    def body(*refs: Any) -> None:
        _body(_Call(tiles, vocabulary, soft_cap, steps, span), *refs)

    rows = gpu.call(
        body,
        name="cross_entropy_forward",
        out_type=jax.ShapeDtypeStruct((splits, 2, hidden.shape[0]), jnp.float32),
        scratch_types=[
            _ring(tiles, hidden.dtype),
            plgpu.SMEM((COMPUTE, 2, ROWS), jnp.float32),
        ],
        grid=(splits, blocks),
        grid_names=("split", "block"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        cost=_work(hidden, weight),
    )(jnp.pad(targets, (0, hidden.shape[0] - num_tokens)), hidden, weight)[:, :, :num_tokens]
    return Rows(jax.nn.logsumexp(rows[:, 0], axis=0), jnp.sum(rows[:, 1], axis=0))


def _work(hidden: Array, weight: Array) -> Any:
    """Of all logits."""
    pairs = hidden.shape[0] * weight.shape[1]
    return cost((hidden, weight), flops=2 * pairs * hidden.shape[1], transcendentals=pairs)


def _whole(x: Array, rows: int, columns: int) -> Array:
    padding = -x.shape[0] % rows, -x.shape[1] % columns
    return jnp.pad(x, ((0, padding[0]), (0, padding[1]))) if any(padding) else x


def slopes(hidden: Array, weight: Array, slope: Slope, soft_cap: float | None) -> Array:
    """dz [N, V] in hidden's dtype, as `by_vocabulary.Kernels` says."""
    tiles = SLOPE_TILES if soft_cap is None else CAPPED_SLOPE_TILES
    (num_tokens, vocabulary) = (hidden.shape[0], weight.shape[1])
    hidden, weight = _whole(hidden, TOKENS, tiles.width), _whole(weight, tiles.width, tiles.vocabulary)
    spare = (0, hidden.shape[0] - num_tokens)
    lse, a, b, target = (jnp.pad(x, spare, constant_values=jnp.inf if x is slope.lse else 0) for x in slope)

    def body(*refs: Any) -> None:
        _slopes_body(tiles, soft_cap, *refs)

    return gpu.call(
        body,
        name="cross_entropy_slopes",
        out_type=jax.ShapeDtypeStruct((hidden.shape[0], weight.shape[1]), hidden.dtype),
        scratch_types=[_ring(tiles, hidden.dtype), gpu.tile((COMPUTE, ROWS, tiles.vocabulary), hidden.dtype)],
        grid=(weight.shape[1] // tiles.vocabulary, hidden.shape[0] // TOKENS),
        grid_names=("tile", "block"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        cost=_work(hidden, weight),
    )(lse * LOG2E, a, b, target, hidden, weight)[:num_tokens, :vocabulary]


def _ring(tiles: Tiles, dtype: Any) -> Any:
    parts = (tiles.stages, TOKENS, tiles.width), (tiles.stages, tiles.width, tiles.vocabulary)
    return gpu.ring(*(gpu.tile(shape, dtype) for shape in parts), readers=COMPUTE)


def _fill(tiles: Tiles, ring: gpu.Ring, hidden: Any, weight: Any, block: Array, first: Array, count: Any) -> None:
    """Copies the parts of a block's tokens and of `count` tiles of the vocabulary from tile `first` on, tile by tile."""
    plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
    parts = hidden.shape[1] // tiles.width

    def copy(step: Array, _: None) -> None:
        tile, part = jax.lax.div(step, jnp.int32(parts)), jax.lax.rem(step, jnp.int32(parts))
        depth = pl.ds(part * tiles.width, tiles.width)
        columns = pl.ds((first + tile) * tiles.vocabulary, tiles.vocabulary)
        ring.fill(step, hidden.at[pl.ds(block * TOKENS, TOKENS), depth], weight.at[depth, columns])

    jax.lax.fori_loop(0, count * parts, copy, None)
    ring.drain(jnp.int32(count * parts))


def _product(tiles: Tiles, ring: gpu.Ring, parts: int, tile: Any, wg: Array) -> Array:
    """hidden weight, float32 [64, V], of one warpgroup and the ring's next tile of the vocabulary."""

    def multiply(acc: Any) -> Array:
        def part(k: Array, _: None) -> None:
            step = tile * parts + k
            x, w = ring.read(step)
            plgpu.wgmma(acc, x.at[pl.ds(wg * ROWS, ROWS)], w)
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(lambda: ring.release(step - 1))

        jax.lax.fori_loop(0, parts, part, None)
        z = acc[...]
        ring.release(jnp.int32(tile * parts + parts - 1))
        return z

    return pl.run_scoped(multiply, plgpu.ACC((ROWS, tiles.vocabulary), jnp.float32))


def _cap(z: Array, soft_cap: float | None) -> Array:
    return z if soft_cap is None else soft_cap * jnp.tanh(z * (1 / soft_cap))


def _columns(size: int) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, size), 1, layout=plgpu.Layout.WGMMA)


class _Call(NamedTuple):
    tiles: Tiles
    vocabulary: int
    """Without padding."""
    soft_cap: float | None
    steps: int
    """Vocabulary tiles in all."""
    span: int
    """Vocabulary tiles of a split."""


def _body(call: _Call, targets: Any, hidden: Any, weight: Any, rows: Any, ring: gpu.Ring, row_tile: Any) -> None:
    split, block, wg = (jax.lax.axis_index(axis) for axis in ("split", "block", "warpgroup"))
    first = split * call.span
    count = jnp.minimum(call.steps - first, call.span)
    parts = hidden.shape[1] // call.tiles.width

    @pl.when(wg == COMPUTE)
    def _load() -> None:
        _fill(call.tiles, ring, hidden, weight, block, first, count)

    @pl.when(wg < COMPUTE)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        own = pl.ds(block * TOKENS + wg * ROWS, ROWS)
        lse, hit = _rows(call, ring, gpu.load(targets.at[own], 0), first, count, parts, wg)
        row_tile.at[wg, 0][...] = lse
        row_tile.at[wg, 1][...] = hit
        plgpu.commit_smem()
        for r in range(2):
            plgpu.copy_smem_to_gmem(row_tile.at[wg, r], rows.at[split, r, own])
        plgpu.wait_smem_to_gmem(0)


def _rows(call: _Call, ring: gpu.Ring, target: Array, first: Array, count: Array, parts: int, wg: Array) -> tuple[Array, Array]:
    """lse over a split's tiles of the vocabulary, and the target's logit or 0, of the 64 tokens of one warpgroup."""
    size = call.tiles.vocabulary

    def visit(tile: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        old, total, hit = state
        z = LOG2E * _cap(_product(call.tiles, ring, parts, tile, wg), call.soft_cap)
        column = _columns(size)
        start = (first + tile) * size
        if call.vocabulary % size:
            z = jnp.where(column < call.vocabulary - start, z, jnp.full_like(z, LOWEST))
        hit += jnp.sum(jnp.where(column == gpu.rows_to(target - start, size), z, jnp.zeros_like(z)), axis=1)
        peak = jnp.maximum(old, jnp.max(z, axis=1))
        total = total * jnp.exp2(old - peak) + jnp.sum(jnp.exp2(z - gpu.rows_to(peak, size)), axis=1)
        return peak, total, hit

    zero = gpu.full((ROWS,), 0.0)
    peak, total, hit = jax.lax.fori_loop(0, count, visit, (gpu.full((ROWS,), LOWEST), zero, zero))
    return LN2 * (peak + jnp.log2(total)), LN2 * hit


def _slopes_body(tiles: Tiles, soft_cap: float | None, *refs: Any) -> None:
    lse, a, b, target, hidden, weight, d_z, ring, out_tile = refs
    tile, block, wg = (jax.lax.axis_index(axis) for axis in ("tile", "block", "warpgroup"))
    parts, size = hidden.shape[1] // tiles.width, tiles.vocabulary

    @pl.when(wg == COMPUTE)
    def _load() -> None:
        _fill(tiles, ring, hidden, weight, block, tile, 1)

    @pl.when(wg < COMPUTE)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        own = pl.ds(block * TOKENS + wg * ROWS, ROWS)
        row = lambda ref: gpu.load(ref.at[own], 0)
        z = _cap(_product(tiles, ring, parts, 0, wg), soft_cap)
        z = jax.lax.optimization_barrier(z)
        slope = jnp.exp2(z * LOG2E - gpu.rows_to(row(lse), size)) * gpu.rows_to(row(a), size)
        here = _columns(size) == gpu.rows_to(row(target) - tile * size, size)
        slope = jnp.where(here, slope + gpu.rows_to(row(b), size), slope)
        if soft_cap is not None:
            scaled = z * (1 / soft_cap)
            slope *= 1 - scaled * scaled
        out_tile.at[wg][...] = slope.astype(d_z.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile.at[wg], d_z.at[own, pl.ds(tile * size, size)])
        plgpu.wait_smem_to_gmem(0)
