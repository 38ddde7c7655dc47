"""What the Hopper kernels of the linear recurrences share: tiles of one chunk, their products, and masks of its tokens."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels import gpu

Array = jax.Array
Ref = Any
Terms = tuple[Array, ...]
"""bfloat16 arrays whose sum is meant: one is rounded to 8 bits, two keep 16."""

CHUNK = 64
"""Tokens a chunk: the rows that one warpgroup multiplies."""

SQUARE = (CHUNK, CHUNK)
BF16, F32 = jnp.bfloat16, jnp.float32
COLUMNS = 128
"""Columns of two products that fit in registers together."""

HALVINGS = CHUNK.bit_length() - 1
"""How often a chunk is halved down to single tokens."""


def tile(*shape: int, dtype: Any = BF16, like: int | None = None) -> Any:
    """A tile in shared memory that wgmma (if bfloat16) and the copies can read.

    Tiles that are multiplied are swizzled alike: `like` is the last axis of the narrowest among them.
    """
    transforms = gpu.tile((*shape[:-1], like or shape[-1]), dtype).transforms
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def line(size: int = CHUNK) -> Any:
    """A float32 vector in shared memory."""
    return plgpu.SMEM((size,), F32)


def matmul(shape: tuple[int, int], *pairs: tuple[Ref, Ref]) -> Array:
    """The float32 sum of the products of pairs of bfloat16 tiles in shared memory."""

    def accumulate(acc: Ref) -> Array:
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(accumulate, plgpu.ACC(shape, F32))


def terms(a: Sequence[Ref], b: Sequence[Ref]) -> list[tuple[Ref, Ref]]:
    """The pairs of tiles, for `matmul`, of the product of two sums of tiles, but those below its last bit."""
    return [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < max(len(a), len(b))]


def blocks(*tiles: Ref, most: int = COLUMNS) -> Iterator[list[Ref]]:
    """The same columns of tiles of one width, at most `most` at a time."""
    for start in range(0, tiles[0].shape[1], most):
        width = min(most, tiles[0].shape[1] - start)
        yield [x.at[:, pl.ds(start, width)] for x in tiles]


def flip(x: Ref) -> Ref:
    """The transpose of a tile in shared memory."""
    return x.transpose((1, 0))


def flips(tiles: Sequence[Ref]) -> list[Ref]:
    """The transposes of tiles."""
    return [flip(x) for x in tiles]


def load(x: Ref) -> Array:
    """A tile, or a matrix in global memory, in registers, in float32, laid out as an accumulator."""
    return plgpu.load(x, layout=plgpu.Layout.WGMMA, optimized=False).astype(F32)  # type: ignore[call-arg]


def by_row(x: Ref, columns: int = CHUNK) -> Array:
    """A vector [M] in shared memory as [M, columns] in registers."""
    return gpu.rows_to(gpu.load(x, 0), columns)


def by_column(x: Ref, rows: int = CHUNK) -> Array:
    """A vector [N] in shared memory as [rows, N] in registers."""
    return gpu.columns_to(gpu.load(x, 1), rows)


def split(x: Array) -> Terms:
    """x float32 as two terms, outside of kernels."""
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # A cast there and back may be optimised away.
    return high.astype(BF16), (x - high).astype(BF16)


def total(x: Terms) -> Array:
    """The float32 sum of terms."""
    return sum((term.astype(F32) for term in x[1:]), start=x[0].astype(F32))


def store(x: Array, *tiles: Ref) -> None:
    """x float32 as the sum of as many bfloat16 tiles as there are."""
    for tile in tiles:
        rounded = x.astype(BF16)
        tile[...] = rounded
        x = x - rounded.astype(F32)


def tokens() -> tuple[Array, Array]:
    """The row and the column of every entry of a square of tokens."""
    row, column = (plgpu.broadcasted_iota(jnp.int32, SQUARE, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
    return row, column


def zero_one(x: Array) -> Array:
    """A mask as bfloat16."""
    return jnp.where(x, 1.0, 0.0).astype(BF16)


def halving(size: Array, row: Array, column: Array) -> Array:
    """The pairs of tokens that runs of `size` tokens are the first to separate: the row in the later one, the column before."""
    apart = row ^ column
    return (row > column) & (apart >= size) & (apart < 2 * size)


def at(x: Ref, b: Any, h: Any, n: Any, columns: Any = slice(None)) -> Ref:
    """What belongs to chunk n of a head: rows of [B, T, H, X], or the matrix in [B, H, N, M, X]."""
    if len(x.shape) == 5:
        return x.at[b, h, n, :, columns]
    return x.at[b, pl.ds(n * CHUNK, CHUNK), h, columns]


def fetch(barrier: Ref, *copies: tuple[Ref, Ref]) -> None:
    """Copies to shared memory and waits."""
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def send(*copies: tuple[Ref, Ref]) -> None:
    """Copies what has been written to shared memory to global memory and waits."""
    plgpu.commit_smem()
    for source, target in copies:
        plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0)
