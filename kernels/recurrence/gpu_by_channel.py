"""Hopper kernels for a decay by channel: the decayed rows and scores of a chunk, and their gradients.

The rows q, k are decayed since the chunk's start, and k to its end; for the scores (see `gpu_scores`) there is one product for each of the
six halvings of the chunk, whose later queries carry the decay since the half's start and whose earlier keys carry the decay up to it.
The exponents of either are products of 0/1 matrices with g in two bfloat16 terms, so that none is a difference of sums. The scores of
queries and those of keys take a launch each, since registers hold no more.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels.gpu import call, full
from plait.kernels.recurrence import gpu_inverse
from plait.kernels.recurrence.gpu_chunk import (
    BF16,
    BLOCK,
    CHUNK,
    F32,
    HALVINGS,
    SQUARE,
    Factors,
    Ref,
    Scaled,
    accumulate,
    at,
    by_column,
    by_row,
    fetch,
    flip,
    flips,
    halving,
    key_head,
    line,
    load,
    matmul,
    one_row,
    send,
    store,
    terms,
    tile,
    tokens,
    zero_of,
    zero_one,
)
from plait.kernels.recurrence.gpu_scores import FORGET, Marks

Array = jax.Array

NARROW = 32
"""Channels that the gradients work on at a time: they take twice the registers."""


def _log_decay(g: Ref, real: Ref, starts: Ref) -> Array:
    """g [C, X] as `gpu_scores` wants it."""
    width = g.shape[1]
    return jnp.where(by_row(starts, width) > 0, FORGET, by_row(real, width) * jnp.maximum(load(g), FORGET))


def _decay(weights: Array, mask: Ref, g: tuple[Ref, Ref]) -> Array:
    """exp of the sums of g's two terms [C, X] under the 0/1 `weights` [C, C], which it leaves in `mask`."""
    mask[...] = zero_one(weights)
    plgpu.commit_smem()
    return jnp.exp(matmul(g[0].shape, (mask, g[0]), (mask, g[1])))


def _since_start() -> Array:
    row, column = tokens()
    return row >= column


def _to_end() -> Array:
    row, column = tokens()
    return row < column


def _within(size: Array, row: Array, column: Array) -> Array:
    """Weights of sums, within runs of `size` tokens, up to each token of later runs and after each token of earlier ones."""
    later = (row & size) != 0
    return ((row ^ column) < size) & ((later & (row >= column)) | (~later & (row < column)))


def factors(scale: float, q: Array, k: Array, g: Array, marks: Marks, beta: Array | None) -> Factors:
    """What the passes over the chunks read.

    Args:
      scale: of the queries.
      q: [B, T, Hqk, K] bfloat16, T a multiple of C.
      k: [B, T, Hqk, K] bfloat16.
      g: [B, T, H, K] float32.
      marks: see there.
      beta: [B, H, N, C] float32, 0 at padding, or nearly; or None.
    """
    queries = _prepare(scale * marks.real, q, k, g, marks, 1 if beta is None else 2, keys=False)
    *scores, decay, q_in = queries[: len(queries) - (1 if beta is None else 2)]
    k_out = Scaled(tuple(queries[len(scores) + 2 :]))
    if beta is None:
        return Factors(Scaled((q_in,)), k_out, decay, tuple(scores))
    inverse = _prepare(beta, k, k, g, marks, 2, keys=True)
    k_in = Scaled(tuple(inverse[gpu_inverse.TERMS :]))
    return Factors(Scaled((q_in,)), k_out, decay, tuple(scores), tuple(inverse[: gpu_inverse.TERMS]), beta, k_in)


def _prepare(by: Array, x: Array, k: Array, g: Array, marks: Marks, num_terms: int, *, keys: bool) -> list[Array]:
    """For queries x the terms of the scores, the chunk's decay, Q_in and the terms of K_out; for keys those of the inverse and of K_in.

    Args:
      by: [B, H or 1, N, C] float32, what the scores, and the rows of queries, are multiplied by.
      x: [B, T, Hqk, K] bfloat16.
      k: see `factors`.
      g: see `factors`.
      marks: see there.
      num_terms: of the scores of queries and of rows of keys.
      keys: whether x is k.
    """
    batch, length, heads, key_dim = g.shape
    chunks, given = length // CHUNK, (*map(one_row, (x, k, g)), by, *marks)
    num_scores, num_rows = (gpu_inverse.TERMS, num_terms) if keys else (num_terms, 1 + num_terms)
    num_outs = num_scores + num_rows + (not keys)
    num_squares = 3 * gpu_inverse.TERMS if keys else 3 + 2 * num_terms

    def kernel(*refs: Ref) -> None:
        (x_ref, k_ref, g_ref, *line_refs), outs, scratch = refs[:6], refs[6:][:num_outs], refs[6 + num_outs :]
        by, real, starts, decay_tile, barrier, all_squares = scratch
        score_refs, row_refs = outs[:num_scores], outs[num_outs - num_rows :]
        b, h, n = (jax.lax.axis_index(name) for name in "bhn")
        own = key_head(x, h, heads)
        places = [ref.at[b, h if ref.shape[1] > 1 else 0, n] for ref in line_refs]
        fetch(barrier, *zip(places, (by, real, starts), strict=True))

        def squares() -> list[Ref]:
            zero = zero_of(real)
            return [all_squares.at[zero + i] for i in range(num_squares)]

        def tokens_anew() -> list[Array]:
            """`tokens`, which is not kept in registers from one use to the next."""
            return [i + zero_of(real) for i in tokens()]

        def step(place: tuple[Any], *args: Any) -> Array:
            (*channels, sums), (j,), (high, low, mask, *decayed) = args, place, squares()
            x, k, g = (t.at[zero_of(real)] for t in channels)
            decays = _log_decay(g, real, starts)
            store(decays, high, low)
            rows = _decay(_since_start(), mask, (high, low)) * load(x)
            if keys:
                store(rows, *decayed[:num_rows])
            else:
                decay_tile[...] = jnp.exp(jnp.sum(decays, axis=0))
                decayed[0][...] = (by_row(by) * rows).astype(BF16)
                plgpu.commit_smem()
                store(_decay(_to_end(), mask, (high, low)) * by_row(real) * load(k), *decayed[1:num_rows])
            block = pl.ds(j * BLOCK, BLOCK)
            copies = [(t, at(ref, b, h, n, block)) for t, ref in zip(decayed, row_refs, strict=False)]
            send(*copies, *([] if keys else [(decay_tile, outs[num_scores].at[b, h, n, block])]))
            if not keys:  # The inverse is of what lies below the diagonal.
                row, column = tokens()
                sums += jnp.where(row == column, matmul(SQUARE, (x, flip(k))), 0.0)

            def halve(level: Array, sums: Array) -> Array:
                size, (high, low, mask, *decayed) = jnp.int32(1) << level, squares()
                x_decayed, k_decayed = decayed[:num_terms], decayed[num_terms:][:num_terms]
                x, k, _ = (t.at[zero_of(real)] for t in channels)
                decay = _decay(_within(size, *tokens_anew()), mask, (high, low))
                for rows, terms_of in ((x, x_decayed), (k, k_decayed)):
                    store(load(rows) * decay, *terms_of)
                plgpu.commit_smem()
                pairs = halving(size, *tokens_anew())
                found = jnp.where(pairs, matmul(SQUARE, *terms(x_decayed, flips(k_decayed))), 0.0)
                plgpu.commit_smem()  # No warp still reads what the next halving writes.
                return sums + found

            return jax.lax.fori_loop(0, HALVINGS, halve, sums)

        spec = lambda x, head: plgpu.BlockSpec(
            (1, CHUNK, None, BLOCK),
            lambda j: (0, b * chunks + n, head, j),
            transforms=tile(CHUNK, BLOCK, dtype=x.dtype).transforms,
        )
        pipeline = plgpu.emit_pipeline(
            step,
            grid=(key_dim // BLOCK,),
            in_specs=[spec(x, own), spec(k, own), spec(g, h)],
            init_carry=full(SQUARE, 0),
        )
        sums = by_row(by) * pipeline(x_ref, k_ref, g_ref)
        if keys:

            def invert(lower: Ref) -> None:
                lower[...] = sums
                plgpu.commit_smem()
                gpu_inverse.invert(
                    lower, *(squares()[i : i + gpu_inverse.TERMS] for i in range(0, num_squares, gpu_inverse.TERMS))
                )

            pl.run_scoped(invert, tile(*SQUARE, dtype=F32))  # Where the pipeline had its tiles.
        else:
            store(by_column(real) * sums, *squares()[:num_scores])
        send(*((t, ref.at[b, h, n]) for t, ref in zip(squares(), score_refs, strict=False)))

    shape = (batch, heads, chunks)
    return call(
        kernel,
        name="inverse_by_channel" if keys else "scores_by_channel",
        out_type=[
            *[jax.ShapeDtypeStruct((*shape, *SQUARE), BF16)] * num_scores,
            *([] if keys else [jax.ShapeDtypeStruct((*shape, key_dim), F32)]),
            *[jax.ShapeDtypeStruct(g.shape, BF16)] * num_rows,
        ],
        grid=shape,
        grid_names=tuple("bhn"),
        scratch_types=[
            *(line(), line(), line(), line(BLOCK), plgpu.Barrier(num_arrivals=3)),
            tile(num_squares, *SQUARE),
        ],
    )(*given)


class Leaving(NamedTuple):
    """Gradients of what writes the leaving state."""

    k_out: Array
    """[B, T, H, K]"""
    decay: Array
    """[B, H, N, K]"""


class SoFar(NamedTuple):
    """Gradients to which more is added, by value head."""

    k: Array
    """[B, T, H, K] bfloat16"""
    g: Array
    """[B, T, H, K] float32"""


def gradients(
    scale: float,
    q: Array,
    k: Array,
    g: Array,
    marks: Marks,
    beta: Array | None,
    *,
    rows: tuple[Array, ...],
    scores: tuple[Array, ...],
    decay: Array,
) -> tuple[Array, SoFar]:
    """The gradients of q and of k and g, by value head.

    Args:
      scale: see `factors`, as what follows.
      q: likewise.
      k: likewise.
      g: likewise.
      marks: likewise.
      beta: likewise.
      rows: [B, T, H, K], the gradients of Q_in, K_out and, with beta, Y S^T.
      scores: [B, H, N, C, C], those of the scores and, with beta, Y X^T.
      decay: [B, H, N, K], that of the chunk's decay.
    """
    leaving = Leaving(rows[1], decay)
    d_q, *so_far = _gradients(scale * marks.real, q, k, g, marks, rows[0], scores[0], leaving=leaving)
    if beta is not None:
        so_far = _gradients(-beta, k, k, g, marks, rows[2], scores[1], so_far=SoFar(*so_far))
    return d_q, SoFar(*so_far)


def _gradients(
    by: Array,
    x: Array,
    k: Array,
    g: Array,
    marks: Marks,
    d_read: Array,
    d_scores: Array,
    *,
    leaving: Leaving | None = None,
    so_far: SoFar | None = None,
) -> list[Array]:
    """Those of queries x, k and g, of the decayed queries and scores that `by` multiplies; with `so_far`, x being k, of k and g in all."""
    batch, length, heads, key_dim = g.shape
    chunks, num_terms, keys = length // CHUNK, 2 if d_scores.dtype == F32 else 1, so_far is not None
    rows = (x, k, g, d_read, *(so_far or ()), *([] if leaving is None else [leaving.k_out]))
    given = (*rows, d_scores, by, *marks, *([] if leaving is None else [leaving.decay]))
    num_outs = 2 if keys else 3

    def kernel(*refs: Ref) -> None:
        ins, outs, (*tiles, barrier) = refs[: len(given)], refs[len(given) :][:num_outs], refs[len(given) + num_outs :]
        tiles, (high, low, mask, *more) = tiles[: len(given)], tiles[len(given) :]
        x_decayed, k_decayed, weights = (more[i * num_terms :][:num_terms] for i in range(3))
        x_tile, k_tile, g_tile, read_tile, *other_rows = tiles[: len(rows)]
        d_tile, by, real, starts, *decay_tile = tiles[len(rows) :]
        b, h, n, j = (jax.lax.axis_index(name) for name in "bhnj")
        own, block, shape = key_head(k, h, heads), pl.ds(j * NARROW, NARROW), (CHUNK, NARROW)
        places = [at(ref, b, own if i < 2 else h, n, block) for i, ref in enumerate(ins[: len(rows)])]
        places += [at(ins[len(rows)], b, h, n)]
        places += [ref.at[b, h if ref.shape[1] > 1 else 0, n] for ref in ins[len(rows) + 1 :][:3]]
        places += [ref.at[b, h, n, block] for ref in ins[len(rows) + 4 :]]
        fetch(barrier, *zip(places, tiles, strict=True))
        row, column = tokens()
        store(_log_decay(g_tile, real, starts), high, low)
        d_tile[...] = (by_row(by) * by_column(real) * load(d_tile)).astype(d_tile.dtype)
        g_tile[...] = load(other_rows[1]) if keys else full(shape, 0)  # From here on the gradient: registers are short.
        if keys:
            d_x, d_k = full(shape, 0), load(other_rows[0])
        else:
            store(jnp.where(row == column, load(d_tile), 0.0), *weights)
            plgpu.commit_smem()
            d_x, d_k = matmul(shape, *terms(weights, [k_tile])), matmul(shape, *terms(weights, [x_tile]))

        def add_exponents(d_exponents: Array) -> None:
            plgpu.commit_smem()  # No warp still reads what is written next.
            store(d_exponents, x_decayed[0], k_decayed[0])
            plgpu.commit_smem()
            (d_g,) = accumulate((load(g_tile), [(flip(mask), x_decayed[0]), (flip(mask), k_decayed[0])]))
            g_tile[...] = d_g

        decay = _decay(_since_start(), mask, (high, low))
        d_rows = by_row(by, NARROW) * load(read_tile) * decay
        d_x += d_rows
        d_exponents = d_rows * load(x_tile)
        if leaving is not None:
            last = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) == CHUNK - 1
            d_exponents += jnp.where(last, by_column(decay_tile[0]) * decay, 0.0)
        add_exponents(d_exponents)
        if leaving is not None:
            plgpu.commit_smem()
            d_rows = by_row(real, NARROW) * load(other_rows[-1]) * _decay(_to_end(), mask, (high, low))
            d_k += d_rows
            add_exponents(d_rows * load(k_tile))

        def halve(level: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            size = jnp.int32(1) << level
            plgpu.commit_smem()  # No warp still reads what is written next.
            decay = _decay(_within(size, *tokens()), mask, (high, low))
            store(load(x_tile) * decay, *x_decayed)
            store(load(k_tile) * decay, *k_decayed)
            store(jnp.where(halving(size, *tokens()), load(d_tile), 0.0), *weights)
            plgpu.commit_smem()
            d_x, d_k = sums
            d_late = matmul(shape, *terms(weights, k_decayed)) * decay
            d_x, d_exponents = d_x + d_late, d_late * load(x_tile)
            d_early = matmul(shape, *terms(flips(weights), x_decayed)) * decay
            d_k, d_exponents = d_k + d_early, d_exponents + d_early * load(k_tile)
            add_exponents(d_exponents)
            return d_x, d_k

        d_x, d_k = jax.lax.fori_loop(0, HALVINGS, halve, (d_x, d_k))
        plgpu.commit_smem()
        g_tile[...] = by_row(real, NARROW) * load(g_tile)
        if keys:
            k_tile[...] = (d_x + d_k).astype(BF16)
        else:
            x_tile[...], k_tile[...] = d_x.astype(BF16), d_k.astype(BF16)
        results = ([] if keys else [x_tile]) + [k_tile, g_tile]
        send(*((t, at(ref, b, h, n, block)) for t, ref in zip(results, outs, strict=True)))

    by_head, block, square = jax.ShapeDtypeStruct(g.shape, BF16), tile(CHUNK, NARROW), tile(*SQUARE, like=NARROW)
    return call(
        kernel,
        name="scores_by_channel_back" if not keys else "inverse_by_channel_back",
        out_type=[by_head] * (num_outs - 1) + [jax.ShapeDtypeStruct(g.shape, F32)],
        grid=(batch, heads, chunks, key_dim // NARROW),
        grid_names=tuple("bhnj"),
        scratch_types=[
            *(tile(CHUNK, NARROW, dtype=row.dtype) for row in rows),
            *(tile(*SQUARE, dtype=d_scores.dtype), line(), line(), line(), *([] if leaving is None else [line(NARROW)])),
            *(block, block, square, *[block] * (2 * num_terms), *[square] * num_terms),
            plgpu.Barrier(num_arrivals=len(given)),
        ],
    )(*given)
