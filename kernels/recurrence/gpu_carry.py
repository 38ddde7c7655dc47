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
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels.gpu import call
from plait.kernels.recurrence.gpu_chunk import BF16, CHUNK, F32, Ref, at, by_row, fetch, flip, line, load, matmul, send, tile

Array = jax.Array

WIDTH = 64
"""Rows of the state in one program of `gradients`."""

_STATE = 128 * 64
"""Numbers of the state in one program of `carry`: registers hold them beside an accumulator of the same size."""

_IN_FLIGHT = 80 << 10
"""Bytes of shared memory that `carry` fills ahead, so that two programs fit a multiprocessor; two chunks are filled in any case."""


class Delta(NamedTuple):
    """The part of a pass that reads the state and writes back: X = base + read S, then S += write^T X."""

    read: Array
    """[B, T, H, K] bfloat16"""
    write: Array
    """[B, T, H, K] bfloat16"""
    base: Array
    """[B, T, H, V] bfloat16"""


def carry(
    decay: Array, initial: Array, *, add: tuple[Array, Array] | None = None, delta: Delta | None = None, reverse: bool = False
) -> tuple[Array, Array, Any]:
    """Carries a state through the chunks: S <- Diag(decay) S + add[0]^T add[1] + write^T X with X = base + read S.

    Args:
      decay: [B, H, N, K] float32.
      initial: [B, H, K, V] float32.
      add: rows of width K and of width V, bfloat16.
      delta: the part that reads the state.
      reverse: from the last chunk to the first.

    Returns:
      The states before each chunk [B, H, N, K, V] bfloat16, the last state [B, H, K, V] float32, and X [B, T, H, V] bfloat16 or None.
    """
    (batch, heads, chunks, key_dim), value_dim = decay.shape, initial.shape[-1]
    loads: list[tuple[Array, bool]] = []  # with whether a program reads all columns, or its share of V
    if add:
        loads += [(add[0], True), (add[1], False)]
    if delta:
        loads += [(delta.read, True), (delta.write, True), (delta.base, False)]
    width = min(64, _STATE // key_dim)
    chunk_bytes = 4 * key_dim + sum(2 * CHUNK * (x.shape[-1] if whole else width) for x, whole in loads)

    def kernel(*refs: Ref) -> None:
        decay_ref, initial_ref, *ins = refs[: 2 + len(loads)]
        states_ref, final_ref, *x_ref, state_smem = refs[2 + len(loads) :]
        b, h, j = (jax.lax.axis_index(name) for name in "bhj")
        columns = pl.ds(j * width, width)
        chunk = (lambda n: chunks - 1 - n) if reverse else (lambda n: n)

        def spec(x: Array, whole: bool) -> Any:
            size, column = (x.shape[-1], 0) if whole else (width, j)
            transforms = tile(CHUNK, size, like=width).transforms
            return plgpu.BlockSpec((None, CHUNK, None, size), lambda n: (b, chunk(n), h, column), transforms=transforms)

        def step(place: tuple[Any], decay_smem: Ref, *args: Any) -> Array:
            *tiles, state = args
            state_smem[...] = state.astype(BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(state_smem, at(states_ref, b, h, chunk(place[0]), columns))
            updates = []
            if add:
                a, rows, *tiles = tiles
                updates.append((flip(a), rows))
            if delta:
                read, write, x = tiles
                x[...] = (load(x) + matmul((CHUNK, width), (read, state_smem))).astype(BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(x, at(x_ref[0], b, h, chunk(place[0]), columns))
                updates.append((flip(write), x))
            state = by_row(decay_smem, width) * state + matmul((key_dim, width), *updates)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()  # Nothing still reads the tiles when the pipeline fills them again.
            return state

        pipeline = plgpu.emit_pipeline(
            step,
            grid=(chunks,),
            in_specs=[plgpu.BlockSpec((None, None, None, key_dim), lambda n: (b, h, chunk(n), 0)), *(spec(*x) for x in loads)],
            max_concurrent_steps=max(2, min(4, _IN_FLIGHT // chunk_bytes)),
            init_carry=load(initial_ref.at[b, h, :, columns]),
        )
        final_ref[b, h, :, columns] = pipeline(decay_ref, *ins)
        plgpu.wait_smem_to_gmem(0)

    outputs = [
        jax.ShapeDtypeStruct((batch, heads, chunks, key_dim, value_dim), BF16),
        jax.ShapeDtypeStruct(initial.shape, F32),
    ]
    if delta:
        outputs.append(jax.ShapeDtypeStruct((batch, chunks * CHUNK, heads, value_dim), BF16))
    states, final, *x = call(
        kernel,
        name=f"carry{'_delta' if delta else ''}{'_back' if reverse else ''}",
        out_type=outputs,
        grid=(batch, heads, value_dim // width),
        grid_names=tuple("bhj"),
        scratch_types=[tile(key_dim, width)],
    )(decay, initial, *(x for x, _ in loads))
    return states, final, x[0] if x else None


def combine(scores: Array, values: Array, *read: Array, transposed: bool = False) -> Array:
    """scores values, or scores^T values, and rows S_n for every chunk: outputs, and the gradients of values.

    Args:
      scores: [B, H, N, C, C] bfloat16.
      values: rows of width V, bfloat16.
      read: none; or rows of width K, bfloat16, and the states [B, H, N, K, V] that they read, bfloat16.
      transposed: takes the transpose of the scores.
    """
    (batch, heads, chunks, *_), value_dim = scores.shape, values.shape[-1]
    count = 2 + len(read)

    def kernel(*refs: Ref) -> None:
        ins, out_ref, tiles, barrier = refs[:count], refs[count], refs[count + 1 : -1], refs[-1]
        place = tuple(jax.lax.axis_index(name) for name in "bhn")
        fetch(barrier, *((at(x, *place), t) for x, t in zip(ins, tiles, strict=True)))
        scores, values, *own_read = tiles
        pairs = [(flip(scores) if transposed else scores, values), *([tuple(own_read)] if read else [])]
        out = matmul((CHUNK, value_dim), *pairs)
        plgpu.commit_smem()  # Every warp has read the tile that is written next.
        values[...] = out.astype(BF16)
        send((values, at(out_ref, *place)))

    tiles = [tile(CHUNK, CHUNK), tile(CHUNK, value_dim)]
    if read:
        key_dim = read[0].shape[-1]
        tiles += [tile(CHUNK, key_dim), tile(key_dim, value_dim)]
    return call(
        kernel,
        name=f"combine{'_back' if transposed else ''}{'' if read else '_local'}",
        out_type=jax.ShapeDtypeStruct(values.shape, BF16),
        grid=(batch, heads, chunks),
        grid_names=tuple("bhn"),
        scratch_types=[*tiles, plgpu.Barrier(num_arrivals=len(tiles))],
    )(scores, values, *read)


class Gradients(NamedTuple):
    """What `gradients` gives: bfloat16, except the decay's float32."""

    q_in: Array
    """[B, T, H, K]"""
    k_out: Array
    """[B, T, H, K]"""
    scores: Array
    """[B, H, N, C, C]"""
    decay: Array
    """[B, H, N, K]"""
    erase: Array | None
    """[B, T, H, K]"""


def gradients(d_o: Array, x: Array, d_x: Array | None, states: Array, d_states: Array) -> Gradients:
    """The gradients of what `carry` and `combine` read, for every chunk.

    Args:
      d_o: rows of width V, bfloat16: the gradient of the outputs.
      x: rows of width V, bfloat16: what each token wrote.
      d_x: its gradient; None without the delta rule.
      states: [B, H, N, K, V] bfloat16, entering.
      d_states: [B, H, N, K, V] bfloat16, the gradients of the leaving ones.
    """
    batch, heads, chunks, key_dim, value_dim = states.shape
    rows = [d_o, x] if d_x is None else [d_o, x, d_x]

    def kernel(*refs: Ref) -> None:
        sources, refs = refs[: len(rows) + 2], refs[len(rows) + 2 :]
        outs, tiles, out_tiles, barrier = refs[: len(like)], refs[len(like) : -len(like)], refs[-len(like) : -1], refs[-1]
        b, h, n, i = (jax.lax.axis_index(name) for name in "bhni")
        block = pl.ds(i * WIDTH, WIDTH)
        blocks = [at(x, b, h, n) for x in sources[:-2]] + [x.at[b, h, n, block, :] for x in sources[-2:]]
        fetch(barrier, *zip(blocks, tiles, strict=True))
        d_o, x, *d_x, state, d_state = tiles
        out_decay, *out_rows = out_tiles
        out_decay[...] = jnp.sum(load(state) * load(d_state), axis=1)
        factors = [(d_o, state), (x, d_state), *((d, state) for d in d_x)]
        for (a, matrix), out in zip(factors, out_rows, strict=True):
            out[...] = matmul((CHUNK, WIDTH), (a, flip(matrix))).astype(BF16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_decay, outs[1].at[b, h, n, block])
        for out, ref in zip(out_rows, outs[2:], strict=True):
            plgpu.copy_smem_to_gmem(out, at(ref, b, h, n, block))
        plgpu.wait_smem_to_gmem(0)

        @pl.when(i == 0)
        def _scores() -> None:
            out_rows[0][...] = matmul((CHUNK, CHUNK), (d_o, flip(x))).astype(BF16)
            send((out_rows[0], outs[0].at[b, h, n]))

    shape = (batch, heads, chunks)
    like = [jax.ShapeDtypeStruct((*shape, CHUNK, CHUNK), BF16), jax.ShapeDtypeStruct((*shape, key_dim), F32)]
    like += [jax.ShapeDtypeStruct((batch, chunks * CHUNK, heads, key_dim), BF16)] * len(rows)
    tiles = [*[tile(CHUNK, value_dim)] * len(rows), *[tile(WIDTH, value_dim)] * 2]
    out_tiles = [line(WIDTH), *[tile(CHUNK, WIDTH)] * len(rows)]
    d_scores, d_decay, d_q, d_k, *d_erase = call(
        kernel,
        name="gradients" if d_x is None else "gradients_delta",
        out_type=like,
        grid=(*shape, key_dim // WIDTH),
        grid_names=tuple("bhni"),
        scratch_types=[*tiles, *out_tiles, plgpu.Barrier(num_arrivals=len(tiles))],
    )(*rows, states, d_states)
    return Gradients(d_q, d_k, d_scores, d_decay, *(d_erase or (None,)))
