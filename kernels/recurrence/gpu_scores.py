"""The Hopper kernel for the decayed scores inside a chunk where all channels share one decay, and the delta rule's inverse of them.

    A_ij = sum_c x_ic k_jc exp(g_{j+1} + ... + g_i)        for j <= i, x being the queries; for j < i, x being the keys

As in `plait.kernels.chunking`, no exponent is positive and none is a difference of sums: all exponents are one product of 0/1 matrices (t
later than j times t not later than i) with g, which is split into two bfloat16 terms. A g of -1e4 where a segment starts hides
everything before. The scores of keys never leave the kernel.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels.gpu import call
from plait.kernels.recurrence import gpu_inverse
from plait.kernels.recurrence.gpu_chunk import (
    BF16,
    CHUNK,
    F32,
    SQUARE,
    Ref,
    Terms,
    at,
    by_column,
    by_row,
    fetch,
    flip,
    key_head,
    line,
    matmul,
    send,
    store,
    tile,
    tokens,
    zero_one,
)

Array = jax.Array

FORGET = -1e4
"""The log decay that ends a segment, and the strongest: its exponential is 0, alone or in any sum."""


class Marks(NamedTuple):
    """What is known of tokens, [B, 1, N, C] float32."""

    real: Array
    """0 at padding and else 1."""
    starts: Array
    """1 where a segment starts and else 0."""


def heads_to_lines(x: Array) -> Array:
    """[B, T, H] to [B, H, N, C]."""
    return jnp.moveaxis(x, 2, 1).reshape(x.shape[0], x.shape[2], -1, CHUNK)


def decay_between(g: Ref, until: Ref, high: Ref, low: Ref) -> Array:
    """exp(g_{j+1} + ... + g_i) for j <= i, else 0, of g [C] in shared memory; leaves i >= t in `until`."""
    row, column = tokens()
    until[...] = zero_one(row >= column)
    store(jnp.where(row > column, by_row(g), 0.0), high, low)
    plgpu.commit_smem()
    return jnp.where(row >= column, jnp.exp(matmul(SQUARE, (until, high), (until, low))), 0.0)


class Lines(NamedTuple):
    """A number for every token, [B, H, N, C] float32, where one decay is shared by all channels."""

    real: Array
    """0 at padding and else 1."""
    g: Array
    """The log decay; -1e4 where a segment starts, and nowhere less."""
    q_in: Array
    """What scales the rows that read the entering state."""
    k_out: Array
    """What scales the rows that write the leaving state."""
    k_in: Any = None
    """What scales the rows of keys that read the entering state; with the delta rule, as beta."""
    beta: Any = None


def shared(scale: float, q: Array, k: Array, lines: Lines) -> tuple[Terms, Terms]:
    """The scores of queries times `scale` and, with the delta rule, the inverse, for a decay that all channels share.

    Args:
      scale: of the queries.
      q: [B, T, Hqk, K] bfloat16, T a multiple of C.
      k: [B, T, Hqk, K] bfloat16.
      lines: see there.

    Returns:
      The terms of the scores, one, or two with the delta rule, and of the inverse, none without it, [B, H, N, C, C].
    """
    g, real, beta = lines.g, lines.real, lines.beta
    batch, heads, chunks, _ = g.shape
    key_dim, delta = q.shape[3], beta is not None
    inputs = [q, k, g, real, *([beta] if delta else [])]
    num_terms = 2 if delta else 1
    num_outs = num_terms + gpu_inverse.TERMS * delta

    def kernel(*refs: Ref) -> None:
        ins, outs, (q, k, g, *scratch, barrier) = (
            refs[: len(inputs)],
            refs[len(inputs) :][:num_outs],
            refs[len(inputs) + num_outs :],
        )
        real, *betas = scratch[: len(inputs) - 3]
        until, high, low, *tiles = scratch[len(inputs) - 3 :]
        b, h, n = (jax.lax.axis_index(name) for name in "bhn")
        own = key_head(q_like, h, heads)
        places = [at(ins[0], b, own, n), at(ins[1], b, own, n), *(x.at[b, h, n] for x in ins[2:])]
        fetch(barrier, *zip(places, (q, k, g, real, *betas), strict=True))
        decay = decay_between(g, until, high, low)
        products = scale * decay * matmul(SQUARE, (q, flip(k)))
        store(products * by_row(real) * by_column(real), *tiles[:num_terms])
        if delta:
            (lower,), squares = tiles[-1:], [x.at[:, pl.ds(i, CHUNK)] for x in (q, k) for i in range(0, key_dim, CHUNK)]
            row, column = tokens()
            lower[...] = jnp.where(row > column, by_row(betas[0]) * decay * matmul(SQUARE, (k, flip(k))), 0.0)
        send(*((tile, ref.at[b, h, n]) for tile, ref in zip(tiles, outs[:num_terms], strict=False)))
        if delta:
            inverse, product = tiles[: gpu_inverse.TERMS], [*squares, *tiles[gpu_inverse.TERMS : -1]][: gpu_inverse.TERMS]
            gpu_inverse.invert(lower, inverse, (until, high, low), product)
            send(*((tile, ref.at[b, h, n]) for tile, ref in zip(inverse, outs[num_terms:], strict=True)))

    q_like = q
    rows, square = tile(CHUNK, key_dim), tile(*SQUARE)
    squares = num_terms + (2 if key_dim == CHUNK else 1) * delta
    out = call(
        kernel,
        name="scores",
        out_type=[jax.ShapeDtypeStruct((batch, heads, chunks, *SQUARE), BF16)] * num_outs,
        grid=(batch, heads, chunks),
        grid_names=tuple("bhn"),
        scratch_types=[
            *(rows, rows, *[line()] * (len(inputs) - 2), *[square] * (3 + squares)),
            *([tile(*SQUARE, dtype=F32)] if delta else []),
            plgpu.Barrier(num_arrivals=len(inputs)),
        ],
    )(*inputs)
    return tuple(out[:num_terms]), tuple(out[num_terms:])


def of_group(d_rows: Array, rows: Array) -> Array:
    """The gradient of `rows` [B, T, Hqk, K], of that by value head."""
    return jnp.sum(d_rows.reshape(*rows.shape[:3], -1, rows.shape[3]), axis=3, dtype=F32).astype(rows.dtype)
