"""The Hopper kernel that solves a chunk of the delta rule for what its tokens write, and the transposed system of the gradients.

With L_ij = beta_i A_ij of the scores A of keys (j < i), X = (I + L)^-1 is built by halves, as in `plait.kernels.chunking`: where X
inverts the diagonal blocks and B is L between the halves of the next larger ones, these are inverted by X - X B X. All factors are
split into three bfloat16 terms, which is all of float32: where keys resemble each other the products are sums of large terms of both
signs.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels.gpu import call, full
from plait.kernels.recurrence.gpu_chunk import (
    BF16,
    CHUNK,
    F32,
    HALVINGS,
    SQUARE,
    Ref,
    Terms,
    at,
    blocks,
    by_column,
    by_row,
    fetch,
    flips,
    halving,
    line,
    load,
    matmul,
    send,
    store,
    terms,
    tile,
    tokens,
)

Array = jax.Array


def _invert(lower: Ref, inverse: Sequence[Ref], block: Sequence[Ref], product: Sequence[Ref]) -> None:
    """Leaves (I + L)^-1 in the three tiles `inverse`, of L [C, C] in shared memory, read where j < i."""
    row, column = tokens()
    store(jnp.where(row == column, 1.0, 0.0), *inverse)

    @pl.loop(0, HALVINGS)
    def _halve(level: Array) -> None:
        store(jnp.where(halving(jnp.int32(1) << level, *tokens()), load(lower), 0.0), *block)
        plgpu.commit_smem()
        store(matmul(SQUARE, *terms(block, inverse)), *product)
        plgpu.commit_smem()
        correction = matmul(SQUARE, *terms(inverse, product))
        plgpu.commit_smem()  # No warp still reads what is written next.
        store(sum(map(load, inverse), start=-correction), *inverse)


def solve(scores: Array, beta: Array, *rows: Terms, transposed: bool = False) -> list[Terms]:
    """X Diag(beta) R or, transposed, X^T R of each of `rows`, in two terms.

    Args:
      scores: [B, H, N, C, C] float32, A; read where j < i.
      beta: [B, H, N, C] float32.
      rows: R, rows of any width, of one term or two.
      transposed: solves the transposed system.
    """
    given = [term for own in rows for term in own]

    def kernel(scores_ref: Ref, beta_ref: Ref, *refs: Ref) -> None:
        ins, refs = refs[: len(given)], refs[len(given) :]
        outs, (scores, beta, *tiles, barrier) = refs[: 2 * len(rows)], refs[2 * len(rows) :]
        scratch, pairs = tiles[:9], [tiles[i : i + 2] for i in range(9, len(tiles), 2)]
        b, h, n = (jax.lax.axis_index(name) for name in "bhn")
        filled = [t for own, pair in zip(rows, pairs, strict=True) for t in pair[: len(own)]]
        copies = [(at(x, b, h, n), t) for x, t in zip(ins, filled, strict=True)]
        fetch(barrier, (at(scores_ref, b, h, n), scores), (beta_ref.at[b, h, n], beta), *copies)
        scores[...] = by_row(beta) * load(scores)
        inverse, weights = scratch[:3], scratch[3:6]
        _invert(scores, inverse, weights, scratch[6:])
        if transposed:
            weights = inverse
        else:
            store(sum(map(load, inverse), start=full(SQUARE, 0)) * by_column(beta), *weights)
        plgpu.commit_smem()
        factor = flips(weights) if transposed else weights
        for own, pair in zip(rows, pairs, strict=True):
            for block in blocks(*pair, most=CHUNK):
                solved = matmul(block[0].shape, *terms(factor, block[: len(own)]))
                plgpu.commit_smem()  # Every warp has read the tiles that are written next.
                store(solved, *block)
        send(*((t, at(ref, b, h, n)) for t, ref in zip(tiles[9:], outs, strict=True)))

    widths = [own[0].shape[-1] for own in rows for _ in range(2)]
    out = call(
        kernel,
        name=f"inverse{'_back' if transposed else ''}",
        out_type=[jax.ShapeDtypeStruct((*given[0].shape[:-1], width), BF16) for width in widths],
        grid=beta.shape[:3],
        grid_names=tuple("bhn"),
        scratch_types=[
            *(tile(*SQUARE, dtype=F32), line(), *[tile(*SQUARE)] * 9, *(tile(CHUNK, width) for width in widths)),
            plgpu.Barrier(num_arrivals=2 + len(given)),
        ],
    )(scores, beta, *given)
    return [tuple(out[i : i + 2]) for i in range(0, len(out), 2)]
