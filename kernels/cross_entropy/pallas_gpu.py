"""Cross entropy for Hopper (Mosaic GPU): no logit of the forward pass leaves the registers.

A block of threads has two warpgroups that compute, 64 tokens each, and one that copies parts of hidden and weight into a ring in shared
memory. The logits of 128 tokens and one tile of the vocabulary are summed over D by `wgmma` and then enter an online log-sum-exp, in
units of log 2; the target's logit is picked up on the way. Where tokens are few, several blocks share the vocabulary and their rows
are merged outside. Gradients: `by_vocabulary`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels import gpu
from plait.kernels.cross_entropy.by_vocabulary import Rows, cross_entropy_of

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


def unsupported(hidden: Array, weight: Array, targets: Array, **_: object) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    if reason := gpu.unavailable():
        return reason
    dtypes = {x.dtype.name for x in (hidden, weight)}
    if dtypes != {"bfloat16"}:
        return f"hidden and weight are {', '.join(sorted(dtypes))}, not bfloat16"
    return None


def cross_entropy(
    hidden: Array, weight: Array, targets: Array, *, loss_mask: Array, logit_soft_cap: float | None, chunk_size: int | None
) -> tuple[Array, Array]:
    """See `plait.kernels.cross_entropy`."""
    return cross_entropy_of(
        forward, hidden, weight, targets, loss_mask=loss_mask, logit_soft_cap=logit_soft_cap, chunk_size=chunk_size
    )


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
            gpu.ring(
                gpu.tile((tiles.stages, TOKENS, tiles.width), hidden.dtype),
                gpu.tile((tiles.stages, tiles.width, tiles.vocabulary), weight.dtype),
                readers=COMPUTE,
            ),
            plgpu.SMEM((COMPUTE, 2, ROWS), jnp.float32),
        ],
        grid=(splits, blocks),
        grid_names=("split", "block"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
    )(jnp.pad(targets, (0, hidden.shape[0] - num_tokens)), hidden, weight)[:, :, :num_tokens]
    return Rows(jax.nn.logsumexp(rows[:, 0], axis=0), jnp.sum(rows[:, 1], axis=0))


def _whole(x: Array, rows: int, columns: int) -> Array:
    padding = -x.shape[0] % rows, -x.shape[1] % columns
    return jnp.pad(x, ((0, padding[0]), (0, padding[1]))) if any(padding) else x


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
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        def copy(step: Array, _: None) -> None:
            tile, part = jax.lax.div(step, jnp.int32(parts)), jax.lax.rem(step, jnp.int32(parts))
            depth = pl.ds(part * call.tiles.width, call.tiles.width)
            columns = pl.ds((first + tile) * call.tiles.vocabulary, call.tiles.vocabulary)
            ring.fill(step, hidden.at[pl.ds(block * TOKENS, TOKENS), depth], weight.at[depth, columns])

        jax.lax.fori_loop(0, count * parts, copy, None)
        ring.drain(count * parts)

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
    shape = (ROWS, size)

    def logits(tile: Array) -> Array:
        def multiply(acc: Any) -> Array:
            def part(k: Array, _: None) -> None:
                step = tile * parts + k
                x, w = ring.read(step)
                plgpu.wgmma(acc, x.at[pl.ds(wg * ROWS, ROWS)], w)
                plgpu.wgmma_wait(1)
                pl.when(k > 0)(lambda: ring.release(step - 1))

            jax.lax.fori_loop(0, parts, part, None)
            z = acc[...]
            ring.release(tile * parts + parts - 1)
            return z

        return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

    def visit(tile: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        old, total, hit = state
        z = logits(tile)
        if call.soft_cap is not None:
            z = call.soft_cap * jnp.tanh(z * (1 / call.soft_cap))
        z = z * LOG2E
        column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
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
