"""The Hopper kernels of the linear recurrences around the state: the pass over chunks, what reads its states, and their gradients.

With the factors of `plait.kernels.recurrence.Chunks`, A the scores inside a chunk, S_n the state that enters chunk n, and E = -W
what the delta rule erases (W = (I + L)^-1 Diag(beta) K_in; without the delta rule X is v):

    X_n = U_n + E_n S_n            S_{n+1} = Diag(d_n) S_n + K_out^T X_n            `carry`
    O_n = Q_in S_n + A X_n                                                          `combine`

and backwards, with Z_n the gradient of the state that leaves chunk n:

    dX_n = A^T dO + K_out Z_n      Z_{n-1} = Diag(d_n) Z_n + Q_in^T dO + E^T dX_n   `carry`, last chunk first; dU is dX
    dQ_in = dO S^T, dK_out = X Z^T, dE = dX S^T, dA = dO X^T, dd = sum_v S Z        `gradients`

Only `carry` runs chunk after chunk. Products are wgmma on bfloat16 tiles in shared memory with float32 accumulators; the running
state stays float32 in registers. Rows are [B, T, H, X], as the model has them.

With the delta rule X holds many writes that nearly cancel each other in their sums over tokens, and a state may fade by nothing: what is
summed over tokens and what goes from state to state has two terms (`gpu_chunk.Terms`). The states that are read once more have one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels.gpu import MAX_SMEM, call
from plait.kernels.recurrence.gpu_chunk import (
    BF16,
    CHUNK,
    COLUMNS,
    F32,
    SQUARE,
    Ref,
    Terms,
    at,
    by_row,
    fetch,
    flip,
    flips,
    line,
    load,
    matmul,
    send,
    store,
    terms,
    tile,
)

Array = jax.Array

WIDTH = 64
"""Rows of the state in one program of `gradients`."""

_STATE = 128 * 64
"""Numbers of the state in one program of `carry`: registers hold them beside an accumulator of the same size."""

_IN_FLIGHT = 80 << 10
"""Bytes of shared memory that `carry` fills ahead, so that two programs fit a multiprocessor; two chunks are filled if they fit."""

_SPARE = 4 << 10
"""Bytes of shared memory that barriers and alignment may take."""


class Delta(NamedTuple):
    """The part of a pass that reads the state and writes back: X = base + read S, then S += write^T X."""

    read: Terms
    """[B, T, H, K], two terms."""
    write: Terms
    """[B, T, H, K], two terms."""
    base: Terms
    """[B, T, H, V], two terms."""


def carry(
    decay: Array, initial: Array, *, add: tuple[Array, Array] | None = None, delta: Delta | None = None, reverse: bool = False
) -> tuple[Array, Array, Terms]:
    """Carries a state through the chunks: S <- Diag(decay) S + add[0]^T add[1] + write^T X with X = base + read S.

    Args:
      decay: [B, H, N, K] float32.
      initial: [B, H, K, V] float32.
      add: rows of width K and of width V, bfloat16.
      delta: the part that reads the state.
      reverse: from the last chunk to the first.

    Returns:
      The states before each chunk [B, H, N, K, V] bfloat16, the last state [B, H, K, V] float32, and the two terms of X [B, T, H, V],
      none without `delta`.
    """
    (batch, heads, chunks, key_dim), value_dim = decay.shape, initial.shape[-1]
    loads: list[tuple[Array, bool]] = []  # with whether a program reads all columns, or its share of V
    if add:
        loads += [(add[0], True), (add[1], False)]
    if delta:
        loads += [(x, True) for x in (*delta.read, *delta.write)] + [(x, False) for x in delta.base]
    num_terms = 2 if delta else 1
    for width in (64, 32):
        chunk_bytes = 4 * key_dim + sum(2 * CHUNK * (x.shape[-1] if whole else width) for x, whole in loads)
        fitting = (MAX_SMEM - _SPARE - num_terms * 2 * key_dim * width) // chunk_bytes
        if width * key_dim <= _STATE and fitting > 1:
            break

    def kernel(*refs: Ref) -> None:
        decay_ref, initial_ref, *ins = refs[: 2 + len(loads)]
        states_ref, final_ref, *refs_left = refs[2 + len(loads) :]
        x_refs, state_smem = refs_left[:-num_terms], refs_left[-num_terms:]
        b, h, j = (jax.lax.axis_index(name) for name in "bhj")
        columns = pl.ds(j * width, width)
        chunk = (lambda n: chunks - 1 - n) if reverse else (lambda n: n)

        def spec(x: Array, whole: bool) -> Any:
            size, column = (x.shape[-1], 0) if whole else (width, j)
            transforms = tile(CHUNK, size, like=width).transforms
            return plgpu.BlockSpec((None, CHUNK, None, size), lambda n: (b, chunk(n), h, column), transforms=transforms)

        def step(place: tuple[Any], decay_smem: Ref, *args: Any) -> Array:
            *tiles, state = args
            store(state, *state_smem)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(state_smem[0], at(states_ref, b, h, chunk(place[0]), columns))
            updates = []
            if add:
                a, rows, *tiles = tiles
                updates.append((flip(a), rows))
            if delta:
                read, write, x = tiles[:2], tiles[2:4], tiles[4:]
                store(sum(map(load, x), start=matmul((CHUNK, width), *terms(read, state_smem))), *x)
                plgpu.commit_smem()
                for term, ref in zip(x, x_refs, strict=True):
                    plgpu.copy_smem_to_gmem(term, at(ref, b, h, chunk(place[0]), columns))
                updates += terms(flips(write), x)
            state = by_row(decay_smem, width) * state + matmul((key_dim, width), *updates)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()  # Nothing still reads the tiles when the pipeline fills them again.
            return state

        pipeline = plgpu.emit_pipeline(
            step,
            grid=(chunks,),
            in_specs=[plgpu.BlockSpec((None, None, None, key_dim), lambda n: (b, h, chunk(n), 0)), *(spec(*x) for x in loads)],
            max_concurrent_steps=max(1, min(4, fitting, max(2, _IN_FLIGHT // chunk_bytes))),
            init_carry=load(initial_ref.at[b, h, :, columns]),
        )
        final_ref[b, h, :, columns] = pipeline(decay_ref, *ins)
        plgpu.wait_smem_to_gmem(0)

    outputs = [
        jax.ShapeDtypeStruct((batch, heads, chunks, key_dim, value_dim), BF16),
        jax.ShapeDtypeStruct(initial.shape, F32),
    ]
    if delta:
        outputs += [jax.ShapeDtypeStruct((batch, chunks * CHUNK, heads, value_dim), BF16)] * num_terms
    states, final, *x = call(
        kernel,
        name=f"carry{'_delta' if delta else ''}{'_back' if reverse else ''}",
        out_type=outputs,
        grid=(batch, heads, value_dim // width),
        grid_names=tuple("bhj"),
        scratch_types=[tile(key_dim, width)] * num_terms,
    )(decay, initial, *(x for x, _ in loads))
    return states, final, tuple(x)


def combine(scores: Array, values: Terms, *read: Array, transposed: bool = False, num_terms: int = 1) -> Terms:
    """scores values, or scores^T values, and rows S_n for every chunk: outputs, and the gradients of values.

    Args:
      scores: [B, H, N, C, C], float32 to be split into two terms, or bfloat16.
      values: rows of width V.
      read: none; or rows of width K, bfloat16, and the states [B, H, N, K, V] that they read, bfloat16.
      transposed: takes the transpose of the scores.
      num_terms: of the result.
    """
    (batch, heads, chunks, *_), value_dim = scores.shape, values[0].shape[-1]
    width, columns, in_halves = min(value_dim, COLUMNS), max(len(values), num_terms), scores.dtype == F32
    inputs = (scores, *values, *read)

    def kernel(*refs: Ref) -> None:
        ins, outs, (scores_tile, *tiles) = refs[: len(inputs)], refs[len(inputs) :][:num_terms], refs[len(inputs) + num_terms :]
        value_tiles, read_tiles, (*weights, barrier) = tiles[:columns], tiles[columns:][: len(read)], tiles[columns + len(read) :]
        b, h, n, j = (jax.lax.axis_index(name) for name in "bhnj")
        own = pl.ds(j * width, width)
        places = [at(ins[0], b, h, n), *(at(x, b, h, n, own) for x in ins[1:])]
        if read:
            places[-2] = at(ins[-2], b, h, n)
        fetch(barrier, *zip(places, (scores_tile, *value_tiles[: len(values)], *read_tiles), strict=True))
        if in_halves:
            store(load(scores_tile), *weights)
            plgpu.commit_smem()
        factor = weights if in_halves else [scores_tile]
        pairs = terms(flips(factor) if transposed else factor, value_tiles[: len(values)])
        out = matmul((CHUNK, width), *pairs, *([tuple(read_tiles)] if read else []))
        plgpu.commit_smem()  # Every warp has read the tiles that are written next.
        store(out, *value_tiles[:num_terms])
        send(*((t, at(ref, b, h, n, own)) for t, ref in zip(value_tiles, outs, strict=False)))

    tiles = [tile(*SQUARE, dtype=scores.dtype), *[tile(CHUNK, width)] * columns]
    if read:
        key_dim = read[0].shape[-1]
        tiles += [tile(CHUNK, key_dim), tile(key_dim, width)]
    out = call(
        kernel,
        name=f"combine{'_back' if transposed else ''}{'' if read else '_local'}",
        out_type=[jax.ShapeDtypeStruct(values[0].shape, BF16)] * num_terms,
        grid=(batch, heads, chunks, value_dim // width),
        grid_names=tuple("bhnj"),
        scratch_types=[*tiles, *[tile(*SQUARE)] * (2 * in_halves), plgpu.Barrier(num_arrivals=len(inputs))],
    )(*inputs)
    return tuple(out)


class Gradients(NamedTuple):
    """What `gradients` gives; bfloat16, with the delta rule float32."""

    decay: Array
    """[B, H, N, K] float32"""
    rows: tuple[Array, ...]
    """[B, T, H, K]: dO S^T of Q_in, X Z^T of K_out and, with the delta rule, Y S^T."""
    scores: tuple[Array, ...]
    """[B, H, N, C, C]: dO X^T and, with the delta rule, Y X^T."""


def gradients(d_o: Array, x: Terms, y: Terms, states: Array, d_states: Array) -> Gradients:
    """The gradients of what `carry` and `combine` read, for every chunk.

    Args:
      d_o: rows of width V, bfloat16: the gradient of the outputs.
      x: rows of width V: what each token wrote.
      y: what `carry` gave backwards; none without the delta rule.
      states: [B, H, N, K, V] bfloat16, entering.
      d_states: [B, H, N, K, V] bfloat16, the gradients of the leaving ones.
    """
    batch, heads, chunks, key_dim, value_dim = states.shape
    rows, num_terms, dtype = [d_o, *x, *y], len(x), F32 if y else BF16

    def kernel(*refs: Ref) -> None:
        num_sources = len(rows) + 2
        sources, outs, scratch = refs[:num_sources], refs[num_sources:][: len(like)], refs[num_sources + len(like) :]
        *tiles, out_decay, out_rows, square, barrier = scratch
        b, h, n, i = (jax.lax.axis_index(name) for name in "bhni")
        block = pl.ds(i * WIDTH, WIDTH)
        blocks = [at(x, b, h, n) for x in sources[:-2]] + [x.at[b, h, n, block, :] for x in sources[-2:]]
        fetch(barrier, *zip(blocks, tiles, strict=True))
        d_o, x, y, (state, d_state) = tiles[:1], tiles[1 : 1 + num_terms], tiles[1 + num_terms : -2], tiles[-2:]
        out_decay[...] = jnp.sum(load(state) * load(d_state), axis=1)
        send((out_decay, outs[0].at[b, h, n, block]))
        for a, matrix, out in zip((d_o, x, y), (state, d_state, state), outs[1 : 1 + sets], strict=False):
            out_rows[...] = matmul((CHUNK, WIDTH), *terms(a, [flip(matrix)])).astype(dtype)
            send((out_rows, at(out, b, h, n, block)))

        @pl.when(i == 0)
        def _squares() -> None:
            for a, out in zip((d_o, y), outs[1 + sets :], strict=False):
                square[...] = matmul(SQUARE, *terms(a, flips(x))).astype(dtype)
                send((square, at(out, b, h, n)))

    shape, sets = (batch, heads, chunks), 3 if y else 2
    like = [jax.ShapeDtypeStruct((*shape, key_dim), F32)]
    like += [jax.ShapeDtypeStruct((batch, chunks * CHUNK, heads, key_dim), dtype)] * sets
    like += [jax.ShapeDtypeStruct((*shape, *SQUARE), dtype)] * (sets - 1)
    tiles = [*[tile(CHUNK, value_dim)] * len(rows), *[tile(WIDTH, value_dim)] * 2]
    out = call(
        kernel,
        name="gradients_delta" if y else "gradients",
        out_type=like,
        grid=(*shape, key_dim // WIDTH),
        grid_names=tuple("bhni"),
        scratch_types=[
            *(*tiles, line(WIDTH), tile(CHUNK, WIDTH, dtype=dtype), tile(*SQUARE, dtype=dtype)),
            plgpu.Barrier(num_arrivals=len(tiles)),
        ],
    )(*rows, states, d_states)
    return Gradients(out[0], tuple(out[1 : 1 + sets]), tuple(out[1 + sets :]))
