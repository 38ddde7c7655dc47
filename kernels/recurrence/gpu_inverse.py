"""Hopper kernels for what a chunk of the delta rule writes, and the gradients.

With L_ij = beta_i A_ij of the scores A of keys (j < i) and X = (I + L)^-1:

    U = X Diag(beta) V        E = X Diag(beta) K        K being the decayed keys with their sign turned, so that E = -W

The inverse is built by halves, as in `plait.kernels.chunking`: where X inverts the diagonal blocks and B is L between the halves of
the next larger ones, these are inverted by X - X B X. Factors are split into two bfloat16 terms, of which three products are kept.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels.gpu import call
from plait.kernels.recurrence.gpu_chunk import (
    BF16,
    CHUNK,
    F32,
    HALVINGS,
    SQUARE,
    Ref,
    at,
    blocks,
    by_column,
    by_row,
    fetch,
    flip,
    halving,
    line,
    load,
    matmul,
    send,
    store_split,
    tile,
    tokens,
    zero_one,
)

Array = jax.Array


def _product(a: tuple[Ref, Ref], b: tuple[Ref, Ref]) -> Array:
    return matmul(SQUARE, (a[0], b[0]), (a[0], b[1]), (a[1], b[0]))


def _inverse(lower: Array, scratch: tuple[Ref, ...]) -> Array:
    """(I + L)^-1 for strictly lower triangular L [C, C]; `scratch` are six tiles."""
    inverse, block, product = (scratch[i : i + 2] for i in (0, 2, 4))
    row, column = tokens()

    def halve(level: Array, x: Array) -> Array:
        plgpu.commit_smem()  # No warp still reads what is written next.
        store_split(x, *inverse)
        store_split(jnp.where(halving(jnp.int32(1) << level, row, column), lower, 0.0), *block)
        plgpu.commit_smem()
        store_split(_product(block, inverse), *product)
        plgpu.commit_smem()
        return x - _product(inverse, product)

    return jax.lax.fori_loop(0, HALVINGS, halve, jnp.where(row == column, 1.0, 0.0))


@jax.custom_vjp
def write(scores: Array, beta: Array, keys: Array, values: Array) -> tuple[Array, Array]:
    """U [B, T, H, V] and E [B, T, H, K], bfloat16.

    Args:
      scores: [B, H, N, C, C] float32, A, zero for j >= i.
      beta: [B, H, N, C] float32.
      keys: [B, T, H, K] bfloat16, decayed since the chunk's start and negated.
      values: [B, T, H, V] bfloat16.
    """
    written, erased = _forward(scores, beta, keys, values, keep=False)
    return written, erased


def _write_forward(*operands: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    written, erased, inverse = _forward(*operands, keep=True)
    return (written, erased), (inverse, *operands)


def _write_backward(saved: Any, cotangents: Any) -> tuple[Array, ...]:
    return tuple(_backward(*saved, *cotangents))


write.defvjp(_write_forward, _write_backward)


def _forward(scores: Array, beta: Array, keys: Array, values: Array, *, keep: bool) -> list[Array]:
    """U [B, T, H, V] and E [B, T, H, K], bfloat16; with `keep` also X [B, H, N, C, C] bfloat16. Arguments as in `write`."""
    shape, dims = beta.shape, (values.shape[-1], keys.shape[-1])

    def kernel(scores_ref: Ref, beta_ref: Ref, keys_ref: Ref, values_ref: Ref, *refs: Ref) -> None:
        outs, (scores, beta, keys, values, *scratch, barrier) = refs[: 2 + keep], refs[2 + keep :]
        b, h, n = (jax.lax.axis_index(name) for name in "bhn")
        places = at(scores_ref, b, h, n), beta_ref.at[b, h, n], at(keys_ref, b, h, n), at(values_ref, b, h, n)
        fetch(barrier, *zip(places, (scores, beta, keys, values), strict=True))
        row, column = tokens()
        x = _inverse(jnp.where(row > column, by_row(beta) * load(scores), 0.0), tuple(scratch))
        plgpu.commit_smem()
        high, low, kept = scratch[:3]
        store_split(x * by_column(beta), high, low)
        kept[...] = x.astype(BF16)
        plgpu.commit_smem()
        for (own,) in (*blocks(values), *blocks(keys)):
            written = matmul(own.shape, (high, own), (low, own))
            plgpu.commit_smem()
            own[...] = written.astype(BF16)
        send(*((x, at(ref, b, h, n)) for x, ref in zip((values, keys, kept), outs, strict=False)))

    outputs = [jax.ShapeDtypeStruct(x.shape, BF16) for x in (values, keys, scores)]
    return call(
        kernel,
        name="inverse",
        out_type=outputs[: 2 + keep],
        grid=shape[:3],
        grid_names=tuple("bhn"),
        scratch_types=[
            *(tile(*SQUARE, dtype=F32), line(), tile(CHUNK, dims[1]), tile(CHUNK, dims[0])),
            *[tile(*SQUARE)] * 6,
            plgpu.Barrier(num_arrivals=4),
        ],
    )(scores, beta, keys, values)


def _backward(
    inverse: Array, scores: Array, beta: Array, keys: Array, values: Array, d_written: Array, d_erased: Array
) -> list[Array]:
    """The gradients of scores (float32), beta, keys and values, bfloat16."""
    shape, dims = beta.shape, (values.shape[-1], keys.shape[-1])

    def kernel(*refs: Ref) -> None:
        ins, outs, (*tiles, barrier) = refs[:7], refs[7:11], refs[11:]
        inverse, scores, beta, keys, values, d_written, d_erased, weights, square, d_beta = tiles
        b, h, n = (jax.lax.axis_index(name) for name in "bhn")
        places = [at(x, b, h, n) if i != 2 else x.at[b, h, n] for i, x in enumerate(ins)]
        fetch(barrier, *zip(places, tiles[:7], strict=True))
        row, column = tokens()
        d_weights = matmul(SQUARE, (d_written, flip(values)), (d_erased, flip(keys)))
        # A sum over rows is one over columns of the transpose, which a product with the unit matrix gives.
        square[...], weights[...] = (d_weights * load(inverse)).astype(BF16), zero_one(row == column)
        plgpu.commit_smem()
        columns = matmul(SQUARE, (flip(square), weights))
        plgpu.commit_smem()
        square[...], weights[...] = ((y * by_column(beta)).astype(BF16) for y in (d_weights, load(inverse)))
        plgpu.commit_smem()
        d_x = matmul(SQUARE, (flip(inverse), square))
        plgpu.commit_smem()
        square[...] = d_x.astype(BF16)
        plgpu.commit_smem()
        d_lower = jnp.where(row > column, -matmul(SQUARE, (square, flip(inverse))), 0.0)
        d_beta[...] = jnp.sum(columns + d_lower * load(scores), axis=1)
        plgpu.commit_smem()  # Every warp has read the scores.
        scores[...] = by_row(beta) * d_lower
        for width, out, d_out in ((dims[0], values, d_written), (dims[1], keys, d_erased)):
            out[...] = matmul((CHUNK, width), (flip(weights), d_out)).astype(BF16)
        out = (scores, d_beta, keys, values)
        send(*zip(out, [ref.at[b, h, n] if ref is outs[1] else at(ref, b, h, n) for ref in outs], strict=True))

    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (scores, beta, keys, values)]
    wide, square = [tile(CHUNK, width) for width in dims], tile(*SQUARE)
    return call(
        kernel,
        name="inverse_back",
        out_type=outputs,
        grid=shape[:3],
        grid_names=tuple("bhn"),
        scratch_types=[
            *(square, tile(*SQUARE, dtype=F32), line(), wide[1], wide[0], wide[0], wide[1], square, square, line()),
            plgpu.Barrier(num_arrivals=7),
        ],
    )(inverse, scores, beta, keys, values, d_written, d_erased)
