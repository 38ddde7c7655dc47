"""The Hopper kernel of the linear recurrences for what a chunk's gradients sum over the values, and what follows from it.

With dO, X, Y, S and Z as in `gpu_carry`, over all columns of the values,

    dQ_in = dO S^T      dK_out = X Z^T      dK_in = -Diag(b) Y S^T      dA = dO X^T      dd = sum_v S Z

and with the delta rule -Diag(b) Y X^T is the gradient of the scores of keys, whose diagonal gives that of b. A program works on a
block of the channels of keys. Where one decay is shared by all channels it goes on to the gradients of q, k and of the decays: what is
summed over channels it gives by block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels.gpu import call, full
from plait.kernels.recurrence.gpu_chunk import (
    BF16,
    BLOCK,
    CHUNK,
    F32,
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
    line,
    load,
    matmul,
    send,
    store,
    terms,
    tile,
    tokens,
)
from plait.kernels.recurrence.gpu_scores import Lines, decay_between

Array = jax.Array


class Sums(NamedTuple):
    """What is summed over the values, for every chunk."""

    values: tuple[Array, ...]
    """Rows of width V, bfloat16: dO, the terms of X and those of Y."""
    states: Array
    """[B, H, N, K, V] bfloat16, entering."""
    d_states: Array
    """[B, H, N, K, V] bfloat16, the gradients of the leaving ones."""

    @property
    def num_terms(self) -> int:
        """Of X."""
        return 2 if self.delta else 1

    @property
    def delta(self) -> bool:
        """Whether there is Y."""
        return len(self.values) > 2

    @property
    def chunks(self) -> tuple[int, ...]:
        """B, H and N."""
        return self.states.shape[:3]

    def kernel(self, refs: tuple[Ref, ...], block: Array, place: tuple[Array, Array, Array]) -> list[Array]:
        """dd, dQ_in, dK_out, dA and, with the delta rule, Y S^T and Y X^T, for a block of keys' channels, in registers."""
        b, h, n = place

        def step(_: Any, *args: Any) -> list[Array]:
            (d_o, *rows, state, d_state), sums = args[: len(refs)], args[len(refs)]
            x, y = rows[: self.num_terms], rows[self.num_terms :]
            pairs = [terms([d_o], [flip(state)]), terms(x, [flip(d_state)]), terms([d_o], flips(x))]
            if y:
                pairs += [terms(y, [flip(state)]), terms(y, flips(x))]
            decay, *products = sums
            decay += jnp.sum(load(state) * load(d_state), axis=1)
            products = accumulate(*zip(products, pairs, strict=True))
            plgpu.commit_smem()  # Nothing still reads the tiles when the pipeline fills them again.
            return [decay, *products]

        transforms = tile(CHUNK, BLOCK).transforms
        rows = plgpu.BlockSpec((None, CHUNK, None, BLOCK), lambda j: (b, n, h, j), transforms=transforms)
        matrix = plgpu.BlockSpec((None, None, None, BLOCK, BLOCK), lambda j: (b, h, n, block, j), transforms=transforms)
        pipeline = plgpu.emit_pipeline(
            step,
            grid=(self.states.shape[-1] // BLOCK,),
            in_specs=[*[rows] * (len(refs) - 2), matrix, matrix],
            max_concurrent_steps=2,
            init_carry=[full((BLOCK,), 0), *[full(SQUARE, 0)] * (5 if self.delta else 3)],
        )
        return pipeline(*refs)


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
    batch, heads, chunks = sums.chunks
    key_dim, dtype, given = sums.states.shape[3], F32 if sums.delta else BF16, (*sums.values, sums.states, sums.d_states)
    sets = 3 if sums.delta else 2

    def kernel(*refs: Ref) -> None:
        ins, (out_decay, *outs) = refs[: len(given)], refs[len(given) :]
        b, h, n, i = (jax.lax.axis_index(name) for name in "bhni")
        block = pl.ds(i * BLOCK, BLOCK)
        decay, d_q, d_k_out, d_scores, *of_keys = sums.kernel(ins, i, (b, h, n))

        def give(decay_tile: Ref, rows: Ref) -> None:
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

        pl.run_scoped(give, line(BLOCK), tile(CHUNK, BLOCK, dtype=dtype))  # Where the values were summed.

    like = [jax.ShapeDtypeStruct((*sums.chunks, key_dim), F32)]
    like += [jax.ShapeDtypeStruct((batch, chunks * CHUNK, heads, key_dim), dtype)] * sets
    like += [jax.ShapeDtypeStruct((*sums.chunks, *SQUARE), dtype)] * (sets - 1)
    out = call(
        kernel,
        name="gradients_by_channel" + ("_delta" if sums.delta else ""),
        sums_columns=False,
        out_type=like,
        grid=(*sums.chunks, key_dim // BLOCK),
        grid_names=tuple("bhni"),
    )(*given)
    return ByRows(out[0], tuple(out[1 : 1 + sets]), tuple(out[1 + sets :]))


class Scratch(NamedTuple):
    """What the gradients of a chunk are made in, where the values were summed."""

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
        square, rows, keys = tile(*SQUARE), tile(CHUNK, BLOCK), num_terms > 1
        lines, d_lines = (plgpu.SMEM((num, CHUNK), F32) for num in (num_lines, num_lines - 1))
        sums, weights, of_keys = [tile(CHUNK, BLOCK, dtype=F32)] * 2, [square] * num_terms, [square] * (num_terms * keys)
        return Scratch(
            rows, rows, lines, d_lines, line(BLOCK), sums, square, [square] * 2, weights, of_keys, plgpu.Barrier(num_arrivals=3)
        )


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


def of_shared(sums: Sums, scale: float, q: Array, k: Array, lines: Lines) -> tuple[Array, Array, Array, Lines]:
    """The gradients of q and k by value head [B, T, H, K], of the decay of a whole chunk [B, H, N, K] and of `lines`.

    Args:
      sums: see there.
      scale: of the scores.
      q: [B, T, Hqk, K] bfloat16.
      k: [B, T, Hqk, K] bfloat16.
      lines: see there.
    """
    batch, heads, chunks = sums.chunks
    key_dim, numbers = q.shape[3], jnp.stack([x for x in (*lines[1:], lines.real) if x is not None], axis=3)  # [B, H, N, L, C]
    given = (*sums.values, sums.states, sums.d_states, q, k, numbers)

    def kernel(*refs: Ref) -> None:
        ins, outs = refs[: len(given)], refs[len(given) :]
        b, h, n, i = (jax.lax.axis_index(name) for name in "bhni")
        block, key = pl.ds(i * BLOCK, BLOCK), key_head(k_like, h, heads)
        num_summed = len(sums.values) + 2
        summed = sums.kernel(ins[:num_summed], i, (b, h, n))
        q_ref, k_ref, lines_ref = ins[num_summed:]
        places = at(q_ref, b, key, n, block), at(k_ref, b, key, n, block), lines_ref.at[b, h, n]

        def finish(tiles: Scratch) -> None:
            plgpu.commit_smem()  # No warp still reads the tiles that were here.
            fetch(tiles.barrier, *zip(places, (tiles.q, tiles.k, tiles.lines), strict=True))
            _finish(scale, tiles, *summed)
            send(
                *((x, at(out, b, h, n, block)) for x, out in zip((tiles.q, tiles.k), outs[:2], strict=True)),
                (tiles.decay, outs[2].at[b, h, n, block]),
                (tiles.d_lines, outs[3].at[b, h, n, i]),
            )

        pl.run_scoped(finish, Scratch.like(numbers.shape[3], sums.num_terms))

    k_like = k
    by_head = jax.ShapeDtypeStruct((batch, chunks * CHUNK, heads, key_dim), BF16)
    d_q, d_k, d_decay, by_block = call(
        kernel,
        name="gradients" + ("_delta" if sums.delta else ""),
        sums_columns=False,
        out_type=[
            *(by_head, by_head, jax.ShapeDtypeStruct((*sums.chunks, key_dim), F32)),
            jax.ShapeDtypeStruct((*sums.chunks, key_dim // BLOCK, numbers.shape[3] - 1, CHUNK), F32),
        ],
        grid=(*sums.chunks, key_dim // BLOCK),
        grid_names=tuple("bhni"),
    )(*given)
    d_lines = Lines(jnp.zeros_like(lines.real), *jnp.moveaxis(by_block.sum(3), 3, 0))
    if sums.delta:
        d_lines = d_lines._replace(beta=by_block[:, :, :, 0, -1] / lines.beta)
    return d_q, d_k, d_decay, d_lines
