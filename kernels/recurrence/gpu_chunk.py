"""What the Hopper kernels of the linear recurrences share: tiles of one chunk, their products, and masks of its tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

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

PAIR = 2
"""Chunks whose gradients are summed over the values together."""

SQUARE = (CHUNK, CHUNK)
BF16, F32 = jnp.bfloat16, jnp.float32

HALVINGS = CHUNK.bit_length() - 1
"""How often a chunk is halved down to single tokens."""

BLOCK = 64
"""Channels that the kernels off the state work on at a time."""


class Scaled(NamedTuple):
    """Rows of tokens, Diag(by) times the sum of `rows`."""

    rows: Terms
    """[B, T, H, K] bfloat16; of fewer heads where value heads share them."""
    by: Any = None
    """[B, H, N, C] float32; None stands for ones."""


class Factors(NamedTuple):
    """What the passes over the chunks read, after `plait.kernels.recurrence.Chunks`; nothing here depends on values or states."""

    q_in: Scaled
    k_out: Scaled
    decay: Array
    """[B, H, N, K] float32"""
    scores: Terms
    """A, [B, H, N, C, C]; two terms with the delta rule, which alone has what follows."""
    inverse: Terms = ()
    """(I + L)^-1 in three terms, [B, H, N, C, C]."""
    beta: Any = None
    """[B, H, N, C] float32"""
    k_in: Scaled = Scaled(())
    """Without rows of its own where these are those of `k_out`."""

    @property
    def read_keys(self) -> Terms:
        """The rows of `k_in`."""
        return self.k_in.rows or self.k_out.rows


def tile(*shape: int, dtype: Any = BF16, like: int | None = None) -> Any:
    """A tile in shared memory that wgmma (if bfloat16) and the copies can read.

    Tiles that are multiplied are swizzled alike: `like` is the last axis of the narrowest among them.
    """
    transforms = gpu.tile((*shape[:-1], like or shape[-1]), dtype).transforms
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def line(size: int = CHUNK) -> Any:
    """A float32 vector in shared memory."""
    return plgpu.SMEM((size,), F32)


def matmul(shape: tuple[int, ...], *pairs: tuple[Ref, Ref]) -> Array:
    """The float32 sum of the products of pairs of bfloat16 tiles in shared memory."""

    def accumulate(acc: Ref) -> Array:
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(accumulate, plgpu.ACC((shape[0], shape[1]), F32))


def accumulate(*sums: tuple[Array, Sequence[tuple[Ref, Ref]]]) -> list[Array]:
    """Each float32 sum plus the products of its pairs of bfloat16 tiles in shared memory, waited for together.

    Compiled, the products are added where the sum is and take no registers of their own; the interpreter has no such form.
    """
    if gpu.interpreted():
        return [have + matmul(have.shape, *pairs) for have, pairs in sums]

    def add(accs: Sequence[Ref]) -> None:
        for acc, (_, pairs) in zip(accs, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(acc, a, b)

    return list(pl.run_state(add)([plgpu.ACC.init(have) for have, _ in sums]))


def terms(a: Sequence[Ref], b: Sequence[Ref]) -> list[tuple[Ref, Ref]]:
    """The pairs of tiles, for `matmul`, of the product of two sums of tiles, but those below its last bit."""
    return [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < max(len(a), len(b))]


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


def total(x: Terms) -> Array:
    """The float32 sum of terms."""
    return sum((term.astype(F32) for term in x[1:]), start=x[0].astype(F32))


def store(x: Array, *tiles: Ref) -> None:
    """x float32 as the sum of as many bfloat16 tiles as there are."""
    for tile in tiles:
        rounded = x.astype(BF16)
        tile[...] = rounded
        x = x - rounded.astype(F32)


def zero_of(x: Ref) -> Array:
    """0, of a vector in shared memory without negative numbers, which is more than the compiler knows.

    What is addressed from it is addressed where it is used: the compiler takes all other addresses of tiles out of a loop, hundreds of
    registers, and spills them.
    """
    return jnp.where(x[0] < 0, 1, 0)


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


def one_row(x: Array) -> Array:
    """[B, N, ...] as [1, B N, ...]. A copy has at most five dimensions, those of tiles among them: a leading one of a block is one, but of an
    array that has but one there."""
    return x.reshape(1, -1, *x.shape[2:])


def key_head(rows: Any, h: Array, heads: int) -> Array:
    """The head of `rows` [B, T, Hqk or H, K] that value head h of H reads."""
    group = heads // rows.shape[2]
    return h if group == 1 else jax.lax.div(h, jnp.int32(group))


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
