"""The Hopper kernels of the linear recurrences for what a chunk's gradients sum over the values (`gpu_sums`) and what follows from it.

Where one decay is shared by all channels a program goes on to the gradients of q, k and of the decays: what is summed over channels it
gives by block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels.gpu import call
from plait.kernels.recurrence.gpu_chunk import (
    BF16,
    BLOCK,
    CHUNK,
    F32,
    PAIR,
    SQUARE,
    Ref,
    accumulate,
    at,
    by_column,
    by_row,
    fetch,
    flip,
    flips,
    key_head,
    load,
    matmul,
    send,
    store,
    terms,
    tile,
    tokens,
)
from plait.kernels.recurrence.gpu_scores import Lines, decay_between
from plait.kernels.recurrence.gpu_sums import WARPGROUPS, Sums

Array = jax.Array


class ByRows(NamedTuple):
    """The gradients of what the passes read, float32 with the delta rule and else bfloat16."""

    decay: Array
    """[B, H, N, K] float32"""
    rows: tuple[Array, ...]
    """[B, T, H, K]: of Q_in, of K_out and, with the delta rule, Y S^T."""
    squares: tuple[Array, ...]
    """[B, H, N, C, C]: of A and, with the delta rule, Y X^T."""


def of_rows(sums: Sums) -> ByRows:
    """The sums themselves."""
    (batch, heads, chunks, key_dim), dtype = sums.factors.decay.shape, F32 if sums.delta else BF16
    sets, (given, factors) = 3 if sums.delta else 2, sums.inputs
    leaves, tree = jax.tree.flatten(factors)

    def kernel(*refs: Ref) -> None:
        ins, (out_decay, *outs) = refs[: len(given) + len(leaves)], refs[len(given) + len(leaves) :]
        *place, w = (jax.lax.axis_index(name) for name in "bhni" + WARPGROUPS)
        b, h, pair, i = place
        n, block = PAIR * pair + w, pl.ds(i * BLOCK, BLOCK)
        made_from = jax.tree.unflatten(tree, ins[len(given) :])
        decay, d_q, d_k_out, d_scores, *of_keys = sums.kernel(ins[: len(given)], made_from, tuple(place), w)

        def give(decay_tile: Ref, rows: Ref) -> None:
            decay_tile, rows = decay_tile.at[w], rows.at[w]
            decay_tile[...] = decay
            send((decay_tile, out_decay.at[b, h, n, block]))
            for x, out in zip((d_q, d_k_out, *of_keys[:1]), outs, strict=False):
                rows[...] = x.astype(dtype)
                send((rows, at(out, b, h, n, block)))

            @pl.when(i == 0)
            def _squares() -> None:
                for x, out in zip((d_scores, *of_keys[1:]), outs[sets:], strict=True):
                    rows[...] = x.astype(dtype)
                    send((rows, at(out, b, h, n)))

        tiles = plgpu.SMEM((PAIR, BLOCK), F32), tile(PAIR, CHUNK, BLOCK, dtype=dtype)
        pl.run_scoped(give, *tiles, collective_axes=WARPGROUPS)  # Where the values were summed.

    like = [jax.ShapeDtypeStruct((*sums.chunks, key_dim), F32)]
    like += [jax.ShapeDtypeStruct((batch, chunks * CHUNK, heads, key_dim), dtype)] * sets
    like += [jax.ShapeDtypeStruct((*sums.chunks, *SQUARE), dtype)] * (sets - 1)
    out = call(
        kernel,
        name="gradients_by_channel" + ("_delta" if sums.delta else ""),
        sums_columns=False,
        out_type=like,
        grid=sums.grid,
        grid_names=tuple("bhni"),
        num_threads=PAIR,
        thread_name=WARPGROUPS,
    )(*given, *leaves)
    return ByRows(out[0], tuple(out[1 : 1 + sets]), tuple(out[1 + sets :]))


class Scratch(NamedTuple):
    """What the gradients of a chunk are made in, where the values were summed; as they are allocated, for both chunks of a pair."""

    q: Ref
    """[C, BLOCK], as k: the rows of a block of channels, then their gradients."""
    k: Ref
    lines: Ref
    """Those of `Lines` that there are, [L, C]; the last is `real`."""
    d_lines: Ref
    """[L - 1, C]"""
    decay: Ref
    """[BLOCK]"""
    sums: list[Ref]
    """[C, BLOCK] float32: the gradients of q and k through the state, out of the way of those through the scores."""
    until: Ref
    """[C, C], as what follows."""
    exponents: list[Ref]
    """Two terms."""
    weights: list[Ref]
    """The terms of the gradient of the products of queries and keys."""
    of_keys: list[Ref]
    """With the delta rule, those of keys and keys."""
    barrier: Ref

    @staticmethod
    def like(num_lines: int, num_terms: int) -> "Scratch":
        """The types of the tiles for a number of terms of what was written."""
        square, rows, keys = tile(PAIR, *SQUARE), tile(PAIR, CHUNK, BLOCK), num_terms > 1
        lines, d_lines, decay = (
            plgpu.SMEM((PAIR, *shape), F32) for shape in ((num_lines, CHUNK), (num_lines - 1, CHUNK), (BLOCK,))
        )
        sums, weights, of_keys = [tile(PAIR, CHUNK, BLOCK, dtype=F32)] * 2, [square] * num_terms, [square] * (num_terms * keys)
        barrier = plgpu.Barrier(num_arrivals=3, num_barriers=PAIR)
        return Scratch(rows, rows, lines, d_lines, decay, sums, square, [square] * 2, weights, of_keys, barrier)


def _finish(scale: float, tiles: Scratch, d_decay: Array, d_q: Array, d_k: Array, d_scores: Array, *of_keys: Array) -> None:
    """Leaves the gradients of q, k and the lines in their tiles; arguments are what `Sums.kernel` gives."""
    q, k, (high, low) = tiles.q, tiles.k, tiles.exponents
    num_lines = tiles.d_lines.shape[0]
    own, d_own = (Lines(tiles.lines.at[num_lines], *(x.at[j] for j in range(num_lines))) for x in (tiles.lines, tiles.d_lines))
    tiles.decay[...] = d_decay
    row, column = tokens()
    if of_keys:
        d_own.beta[...] = jnp.sum(jnp.where(row == column, of_keys[1], 0.0), axis=1)
    d_own.q_in[...] = jnp.sum(load(q) * d_q, axis=1)
    d_own.k_out[...] = jnp.sum(load(k) * d_k, axis=1)
    d_q, d_k = by_row(own.q_in) * d_q, by_row(own.k_out) * d_k
    if of_keys:
        d_k_in, d_keys = (by_row(own.beta) * -x for x in of_keys)
        d_own.k_in[...] = jnp.sum(load(k) * d_k_in, axis=1)
        d_k += by_row(own.k_in) * d_k_in
    for x, parked in zip((d_q, d_k), tiles.sums, strict=True):
        parked[...] = x
    decay = decay_between(own.g, tiles.until, high, low)
    d_products = scale * decay * by_row(own.real) * by_column(own.real) * d_scores
    store(d_products, *tiles.weights)
    d_exponents = d_products * matmul(SQUARE, (q, flip(k)))
    if of_keys:
        d_keys = jnp.where(row > column, decay * d_keys, 0.0)
        store(d_keys, *tiles.of_keys)
        d_exponents += d_keys * matmul(SQUARE, (k, flip(k)))
    plgpu.commit_smem()  # No warp still reads what is written next.
    store(d_exponents, high, low)
    plgpu.commit_smem()
    crossing = matmul(SQUARE, (flip(tiles.until), high), (flip(tiles.until), low))
    d_own.g[...] = jnp.sum(jnp.where(row > column, crossing, 0.0), axis=1)
    to_k = [*terms(flips(tiles.weights), [q]), *terms(tiles.of_keys, [k]), *terms(flips(tiles.of_keys), [k])]
    d_q, d_k = accumulate(*zip(map(load, tiles.sums), (terms(tiles.weights, [k]), to_k), strict=True))
    plgpu.commit_smem()
    q[...], k[...] = d_q.astype(BF16), d_k.astype(BF16)


def of_shared(sums: Sums, scale: float, lines: Lines) -> tuple[Array, Array, Array, Lines]:
    """The gradients of q and k by value head [B, T, H, K], of the decay of a whole chunk [B, H, N, K] and of `lines`.

    Args:
      sums: see there; of its factors the rows are q and k.
      scale: of the scores.
      lines: see there.
    """
    (batch, heads, chunks, key_dim), (given, factors) = sums.factors.decay.shape, sums.inputs
    numbers = jnp.stack([x for x in (*lines[1:], lines.real) if x is not None], axis=3)  # [B, H, N, L, C]
    leaves, tree = jax.tree.flatten(factors)

    def kernel(*refs: Ref) -> None:
        ins, lines_ref, outs = (
            refs[: len(given) + len(leaves)],
            refs[len(given) + len(leaves)],
            refs[len(given) + len(leaves) + 1 :],
        )
        *place, w = (jax.lax.axis_index(name) for name in "bhni" + WARPGROUPS)
        b, h, pair, i = place
        n, block = PAIR * pair + w, pl.ds(i * BLOCK, BLOCK)
        made_from = jax.tree.unflatten(tree, ins[len(given) :])
        summed = sums.kernel(ins[: len(given)], made_from, tuple(place), w)
        (q_ref,), (k_ref,) = made_from.q_in.rows, made_from.k_out.rows
        key = key_head(k_ref, h, heads)
        places = at(q_ref, b, key, n, block), at(k_ref, b, key, n, block), lines_ref.at[b, h, n]

        def finish(*tiles: Any) -> None:
            own = jax.tree.map(lambda x: x.at[w], Scratch(*tiles), is_leaf=lambda x: not isinstance(x, (Scratch, list)))
            plgpu.commit_smem()  # No warp still reads the tiles that were here.
            fetch(own.barrier, *zip(places, (own.q, own.k, own.lines), strict=True))
            _finish(scale, own, *summed)
            send(
                *((x, at(out, b, h, n, block)) for x, out in zip((own.q, own.k), outs[:2], strict=True)),
                (own.decay, outs[2].at[b, h, n, block]),
                (own.d_lines, outs[3].at[b, h, n, i]),
            )

        pl.run_scoped(finish, *Scratch.like(numbers.shape[3], sums.num_terms), collective_axes=WARPGROUPS)

    by_head = jax.ShapeDtypeStruct((batch, chunks * CHUNK, heads, key_dim), BF16)
    d_q, d_k, d_decay, by_block = call(
        kernel,
        name="gradients" + ("_delta" if sums.delta else ""),
        sums_columns=False,
        out_type=[
            *(by_head, by_head, jax.ShapeDtypeStruct((*sums.chunks, key_dim), F32)),
            jax.ShapeDtypeStruct((*sums.chunks, key_dim // BLOCK, numbers.shape[3] - 1, CHUNK), F32),
        ],
        grid=sums.grid,
        grid_names=tuple("bhni"),
        num_threads=PAIR,
        thread_name=WARPGROUPS,
    )(*given, *leaves, numbers)
    d_lines = Lines(jnp.zeros_like(lines.real), *jnp.moveaxis(by_block.sum(3), 3, 0))
    if sums.delta:
        d_lines = d_lines._replace(beta=by_block[:, :, :, 0, -1] / lines.beta)
    return d_q, d_k, d_decay, d_lines
