"""Hopper kernels for the decayed scores inside a chunk, and their gradients.

    A_ij = sum_c x_ic k_jc exp(g_{j+1,c} + ... + g_ic)        for j <= i, x being the queries; for j < i, x being the keys

As in `plait.kernels.chunking`, no exponent is positive and none is a difference of sums: exponents are products of 0/1 matrices with
g, which is split into two bfloat16 terms. A decay shared by all channels takes one product for all exponents (t later than j times t
not later than i); a decay by channel takes one for each of the six halvings of the chunk, whose later queries carry the decay
since the half's start and whose earlier keys carry the decay up to it. A g of -1e4 where a segment starts hides everything before.
"""

from functools import partial
from typing import Any

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
    at,
    blocks,
    by_row,
    fetch,
    flip,
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
    zero_one,
)

Array = jax.Array

WIDTH = 64
"""Channels that the kernel of a decay by channel works on at a time."""

NARROW = 32
"""Likewise for its gradients, which take twice the registers."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scores(keys: bool, scale: float, q: Array, k: Array, g: Array) -> tuple[Array, ...]:
    """The scores of queries times `scale`, [B, H, N, C, C] bfloat16; with `keys` float32, and those of keys, of which j < i counts.

    With `keys` they meet writes that nearly cancel each other, so all factors have two terms.

    Args:
      q: [B, T, Hqk, K] bfloat16, T a multiple of C.
      k: [B, T, Hqk, K] bfloat16.
      g: [B, T, H] or [B, T, H, K] float32; -1e4 where a segment starts, and nowhere less.
    """
    if g.ndim == 3:
        return tuple(_shared(keys, scale, q, k, heads_to_lines(g)))
    return (
        tuple(_by_channel(*each, k, g, F32) for each in ((scale, q), (1.0, k))) if keys else (_by_channel(scale, q, k, g, BF16),)
    )


def heads_to_lines(x: Array) -> Array:
    """[B, T, H] to [B, H, N, C]."""
    return jnp.moveaxis(x, 2, 1).reshape(x.shape[0], x.shape[2], -1, CHUNK)


def _scores_forward(keys: bool, scale: float, q: Array, k: Array, g: Array) -> Any:
    return scores(keys, scale, q, k, g), (q, k, g)


def _scores_backward(keys: bool, scale: float, saved: tuple[Array, ...], d_scores: tuple[Array, ...]) -> tuple[Array, ...]:
    q, k, g = saved
    if g.ndim == 3:
        d_q, d_k, d_g = _shared_gradients(scale, q, k, heads_to_lines(g), *d_scores)
        d_g = jnp.moveaxis(d_g.reshape(*d_g.shape[:2], -1), 1, 2)
    else:
        d_q, d_k, d_g = _by_channel_gradients(scale, q, k, g, d_scores[0])
        if keys:
            more = _by_channel_gradients(1.0, k, k, g, jnp.tril(d_scores[1], -1))
            d_k, d_g = d_k.astype(F32) + more[0].astype(F32) + more[1].astype(F32), d_g + more[2]
    of_group = lambda x: jnp.sum(x.reshape(*q.shape[:3], -1, q.shape[3]), axis=3, dtype=F32).astype(q.dtype)
    return of_group(d_q), of_group(d_k), d_g


scores.defvjp(_scores_forward, _scores_backward)


def _decay(g: Ref, until: Ref, high: Ref, low: Ref) -> Array:
    """exp(g_{j+1} + ... + g_i) for j <= i, else 0, of g [C] in shared memory; leaves i >= t in `until`."""
    row, column = tokens()
    until[...] = zero_one(row >= column)
    store(jnp.where(row > column, by_row(g), 0.0), high, low)
    plgpu.commit_smem()
    return jnp.where(row >= column, jnp.exp(matmul(SQUARE, (until, high), (until, low))), 0.0)


def _shared(keys: bool, scale: float, q: Array, k: Array, g: Array) -> list[Array]:
    """The scores of queries and, with `keys`, of keys for g [B, H, N, C]."""
    batch, heads, chunks, _ = g.shape
    group, key_dim = heads // q.shape[2], q.shape[3]

    def kernel(q_ref: Ref, k_ref: Ref, g_ref: Ref, *refs: Ref) -> None:
        outs, (q, k, g, until, high, low, *tiles, barrier) = refs[: 1 + keys], refs[1 + keys :]
        b, h, n = (jax.lax.axis_index(name) for name in "bhn")
        own = jax.lax.div(h, jnp.int32(group))
        fetch(barrier, (at(q_ref, b, own, n), q), (at(k_ref, b, own, n), k), (g_ref.at[b, h, n], g))
        decay = _decay(g, until, high, low)
        tiles[0][...] = (scale * decay * matmul(SQUARE, (q, flip(k)))).astype(dtypes[0])
        if keys:
            row, column = tokens()
            tiles[1][...] = jnp.where(row > column, decay * matmul(SQUARE, (k, flip(k))), 0.0)
        send(*((out, ref.at[b, h, n]) for out, ref in zip(tiles, outs, strict=True)))

    dtypes = [F32, F32] if keys else [BF16]
    rows, square = tile(CHUNK, key_dim), tile(*SQUARE)
    return call(
        kernel,
        name="scores",
        out_type=[jax.ShapeDtypeStruct((batch, heads, chunks, *SQUARE), dtype) for dtype in dtypes],
        grid=(batch, heads, chunks),
        grid_names=tuple("bhn"),
        scratch_types=[
            *(rows, rows, line(), square, square, square),
            *(tile(*SQUARE, dtype=dtype) for dtype in dtypes),
            plgpu.Barrier(num_arrivals=3),
        ],
    )(q, k, g)


def _shared_gradients(scale: float, q: Array, k: Array, g: Array, *d_scores: Array) -> list[Array]:
    """The gradients of q and k, [B, T, H, K] by value head, and of g."""
    batch, heads, chunks, _ = g.shape
    group, key_dim, count, num_terms = heads // q.shape[2], q.shape[3], 3 + len(d_scores), len(d_scores)

    def kernel(*refs: Ref) -> None:
        (q_ref, k_ref, g_ref, *d_refs), outs, scratch = refs[:count], refs[count : count + 3], refs[count + 3 :]
        (q, k, g, until, high, low, d_g), (*d_tiles, barrier) = scratch[:7], scratch[7:]
        d_tiles, weights, of_keys = (d_tiles[i * num_terms : (i + 1) * num_terms] for i in range(3))
        b, h, n = (jax.lax.axis_index(name) for name in "bhn")
        own = jax.lax.div(h, jnp.int32(group))
        places = [at(q_ref, b, own, n), at(k_ref, b, own, n), g_ref.at[b, h, n], *(x.at[b, h, n] for x in d_refs)]
        fetch(barrier, *zip(places, (q, k, g, *d_tiles), strict=True))
        row, column = tokens()
        decay = _decay(g, until, high, low)
        d_products = scale * decay * load(d_tiles[0])
        d_exponents = d_products * matmul(SQUARE, (q, flip(k)))
        store(d_products, *weights)
        if len(d_scores) > 1:
            d_own = jnp.where(row > column, decay * load(d_tiles[1]), 0.0)
            d_exponents += d_own * matmul(SQUARE, (k, flip(k)))
            store(d_own, *of_keys)
        plgpu.commit_smem()  # No warp still reads what is written next.
        store(d_exponents, high, low)
        plgpu.commit_smem()
        crossing = matmul(SQUARE, (flip(until), high), (flip(until), low))
        d_g[...] = jnp.sum(jnp.where(row > column, crossing, 0.0), axis=1)
        for own_q, own_k in blocks(q, k):
            to_k = terms(flips(weights), [own_q]) + terms(of_keys, [own_k]) + terms(flips(of_keys), [own_k])
            d_q, d_k = matmul(own_q.shape, *terms(weights, [own_k])), matmul(own_q.shape, *to_k)
            plgpu.commit_smem()
            own_q[...], own_k[...] = d_q.astype(BF16), d_k.astype(BF16)
        send((q, at(outs[0], b, h, n)), (k, at(outs[1], b, h, n)), (d_g, outs[2].at[b, h, n]))

    rows, square = tile(CHUNK, key_dim), tile(*SQUARE)
    by_head = jax.ShapeDtypeStruct((batch, chunks * CHUNK, heads, key_dim), BF16)
    return call(
        kernel,
        name="scores_back",
        out_type=[by_head, by_head, jax.ShapeDtypeStruct(g.shape, F32)],
        grid=(batch, heads, chunks),
        grid_names=tuple("bhn"),
        scratch_types=[
            *(rows, rows, line(), square, square, square, line()),
            *(tile(*SQUARE, dtype=x.dtype) for x in d_scores),
            *[square] * (num_terms if num_terms == 1 else 2 * num_terms),
            plgpu.Barrier(num_arrivals=count),
        ],
    )(q, k, g, *d_scores)


def _exponentials(size: Array, mask: Ref, g: tuple[Ref, Ref], width: int) -> Array:
    """exp of g summed, within runs of `size` tokens, up to each token of later runs and after each token of earlier ones.

    Leaves the 0/1 weights of these sums in `mask`; `g` are the two terms of [C, width].
    """
    row, column = tokens()
    later = (row & size) != 0
    mask[...] = zero_one(((row ^ column) < size) & ((later & (row >= column)) | (~later & (row < column))))
    plgpu.commit_smem()
    return jnp.exp(matmul((CHUNK, width), (mask, g[0]), (mask, g[1])))


def _by_channel(scale: float, q: Array, k: Array, g: Array, dtype: Any) -> Array:
    """The scores of queries for g [B, T, H, K], with factors of two terms where they are float32."""
    batch, length, heads, key_dim = g.shape
    group, chunks, num_terms = heads // q.shape[2], length // CHUNK, 2 if dtype == F32 else 1

    def kernel(q_ref: Ref, k_ref: Ref, g_ref: Ref, out_ref: Ref, *scratch: Ref) -> None:
        high, low, mask, out, *decayed = scratch
        q_decayed, k_decayed = decayed[:num_terms], decayed[num_terms:]
        b, h, n = (jax.lax.axis_index(name) for name in "bhn")
        own = jax.lax.div(h, jnp.int32(group))

        def step(_: Any, q: Ref, k: Ref, g: Ref, sums: Array) -> Array:
            row, column = tokens()
            store(load(g), high, low)
            sums += jnp.where(row == column, matmul(SQUARE, (q, flip(k))), 0.0)

            def halve(level: Array, sums: Array) -> Array:
                size = jnp.int32(1) << level
                decay = _exponentials(size, mask, (high, low), WIDTH)
                for x, decayed in ((q, q_decayed), (k, k_decayed)):
                    store(load(x) * decay, *decayed)
                plgpu.commit_smem()
                pairs = halving(size, row, column)
                found = jnp.where(pairs, matmul(SQUARE, *terms(q_decayed, flips(k_decayed))), 0.0)
                plgpu.commit_smem()  # No warp still reads what the next halving writes.
                return sums + found

            return jax.lax.fori_loop(0, HALVINGS, halve, sums)

        spec = lambda x, head: plgpu.BlockSpec(
            (None, CHUNK, None, WIDTH), lambda j: (b, n, head, j), transforms=tile(CHUNK, WIDTH, dtype=x.dtype).transforms
        )
        pipeline = plgpu.emit_pipeline(
            step,
            grid=(key_dim // WIDTH,),
            in_specs=[spec(q, own), spec(k, own), spec(g, h)],
            init_carry=full(SQUARE, 0),
        )
        out[...] = (scale * pipeline(q_ref, k_ref, g_ref)).astype(dtype)
        send((out, out_ref.at[b, h, n]))

    block = tile(CHUNK, WIDTH)
    return call(
        kernel,
        name="scores_by_channel",
        out_type=jax.ShapeDtypeStruct((batch, heads, chunks, *SQUARE), dtype),
        grid=(batch, heads, chunks),
        grid_names=tuple("bhn"),
        scratch_types=[block, block, tile(*SQUARE), tile(*SQUARE, dtype=dtype), *[block] * (2 * num_terms)],
    )(q, k, g)


def _by_channel_gradients(scale: float, q: Array, k: Array, g: Array, d_scores: Array) -> list[Array]:
    """The gradients of q and k, [B, T, H, K] by value head, and of g."""
    batch, length, heads, key_dim = g.shape
    group, chunks, num_terms = heads // q.shape[2], length // CHUNK, 2 if d_scores.dtype == F32 else 1

    def kernel(*refs: Ref) -> None:
        ins, outs, (*tiles, barrier) = refs[:4], refs[4:7], refs[7:]
        (q, k, g, d_tile, high, low, mask), terms_left = tiles[:7], tiles[7:]
        q_decayed, k_decayed, weights = (terms_left[i * num_terms :][:num_terms] for i in range(3))
        b, h, n, j = (jax.lax.axis_index(name) for name in "bhnj")
        own, block = jax.lax.div(h, jnp.int32(group)), pl.ds(j * NARROW, NARROW)
        places = [at(x, b, head, n, block) for x, head in zip(ins[:3], (own, own, h), strict=True)]
        fetch(barrier, *zip([*places, at(ins[3], b, h, n)], tiles[:4], strict=True))
        row, column = tokens()
        shape = (CHUNK, NARROW)
        store(load(g), high, low)
        store(jnp.where(row == column, scale * load(d_tile), 0.0), *weights)
        plgpu.commit_smem()
        g[...] = full(shape, 0)  # From here on the gradient: registers are short.
        sums = matmul(shape, *terms(weights, [k])), matmul(shape, *terms(weights, [q]))

        def halve(level: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            size = jnp.int32(1) << level
            plgpu.commit_smem()  # No warp still reads what is written next.
            decay = _exponentials(size, mask, (high, low), NARROW)
            store(load(q) * decay, *q_decayed)
            store(load(k) * decay, *k_decayed)
            pairs = halving(size, *tokens())
            store(jnp.where(pairs, scale * load(d_tile), 0.0), *weights)
            plgpu.commit_smem()
            d_q, d_k = sums
            d_late = matmul(shape, *terms(weights, k_decayed)) * decay
            d_q, d_exponents = d_q + d_late, d_late * load(q)
            d_early = matmul(shape, *terms(flips(weights), q_decayed)) * decay
            d_k, d_exponents = d_k + d_early, d_exponents + d_early * load(k)
            plgpu.commit_smem()
            store(d_exponents, q_decayed[0], k_decayed[0])
            plgpu.commit_smem()
            g[...] = load(g) + matmul(shape, (flip(mask), q_decayed[0]), (flip(mask), k_decayed[0]))
            return d_q, d_k

        d_q, d_k = jax.lax.fori_loop(0, HALVINGS, halve, sums)
        plgpu.commit_smem()
        q[...], k[...] = d_q.astype(BF16), d_k.astype(BF16)
        send(*((x, at(ref, b, h, n, block)) for x, ref in zip((q, k, g), outs, strict=True)))

    by_head = jax.ShapeDtypeStruct(g.shape, BF16)
    block, square = tile(CHUNK, NARROW), tile(*SQUARE, like=NARROW)
    return call(
        kernel,
        name="scores_by_channel_back",
        out_type=[by_head, by_head, jax.ShapeDtypeStruct(g.shape, F32)],
        grid=(batch, heads, chunks, key_dim // NARROW),
        grid_names=tuple("bhnj"),
        scratch_types=[
            *(block, block, tile(CHUNK, NARROW, dtype=F32), tile(*SQUARE, dtype=d_scores.dtype)),
            *(block, block, square, *[block] * (2 * num_terms), *[square] * num_terms),
            plgpu.Barrier(num_arrivals=4),
        ],
    )(q, k, g, d_scores)
