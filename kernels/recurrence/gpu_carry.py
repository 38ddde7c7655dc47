"""The Hopper kernels of the linear recurrences that pass over the chunks, one after another, forwards and backwards.

With the factors of `plait.kernels.recurrence.Chunks`, A the scores inside a chunk, T = (I + L)^-1 and b the betas of the delta rule
(without it X is v) and S_n the state that enters chunk n:

    X_n = T Diag(b) (V - K_in S_n)      O_n = Q_in S_n + A X_n          S_{n+1} = Diag(d_n) S_n + K_out^T X_n        `forward`

and, with Z_n the gradient of the state that leaves chunk n, from the last chunk to the first:

    dX_n = A^T dO + K_out Z_n           Y_n = T^T dX_n, dV = Diag(b) Y_n
    Z_{n-1} = Diag(d_n) Z_n + Q_in^T dO - K_in^T Diag(b) Y_n                                                         `backward`

Y and dV are dX without the delta rule. Products are wgmma on bfloat16 tiles in shared memory with float32 accumulators; the running
state stays float32 in registers. Rows are [B, T, H, X], as the model has them; where one decay is shared by all channels they are
the model's own, exact in one term, and what they multiply is scaled token by token.

With the delta rule X holds many writes that nearly cancel each other in their sums over tokens, and a state may fade by nothing: what is
summed over tokens and what goes from state to state has two terms (`gpu_chunk.Terms`). The states that are read once more have one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels.gpu import MAX_SMEM, call, full
from plait.kernels.recurrence.gpu_chunk import (
    BF16,
    CHUNK,
    F32,
    Factors,
    Ref,
    Terms,
    accumulate,
    at,
    by_row,
    flips,
    key_head,
    load,
    matmul,
    one_row,
    send,
    store,
    terms,
    tile,
    zero_of,
)

Array = jax.Array

_STATE = 128 * 64
"""Numbers of the state in one program, which registers hold."""

_IN_FLIGHT = 80 << 10
"""Bytes of shared memory that are filled ahead, so that two programs fit a multiprocessor; two chunks are filled if they fit."""

_SPARE = 1 << 10
"""Bytes of shared memory that barriers and alignment may take."""


class Chunk(NamedTuple):
    """What a step of a pass reads."""

    factors: Factors
    values: Array
    """[B, T, H, V] bfloat16: v, or dO."""


class Scratch(NamedTuple):
    """What a step of a pass has beside its chunk."""

    state: list[Ref]
    """The terms of the state before the step."""
    held: list[Ref]
    """With the delta rule, the terms of X or Y [C, width]."""
    keep: Callable[[], None]
    """Starts the copies of `held` to global memory, where they are wanted."""
    give: Callable[[Array], None]
    """Starts the copy of the step's result [C, width]."""


Update = list[tuple[Ref, Ref]]
"""The products that are added to the decayed state."""


def _scale(by: Ref | None, x: Array) -> Array:
    return x if by is None else by_row(by, x.shape[1]) * x


def forward(f: Factors, v: Array, initial: Array | None, *, keep: int) -> tuple[Array, Array, Any, Terms]:
    """The outputs and the final state.

    Args:
      f: see there.
      v: [B, T, H, V] bfloat16.
      initial: [B, H, K, V] float32; None for zeros.
      keep: 0, or every how many chunks the state is kept for the backward pass, and whatever else that reads.

    Returns:
      o [B, T, H, V] bfloat16, the last state [B, H, K, V] float32 and, if wanted, the states that enter the chunks [B, H, N / keep, K, V]
      bfloat16 and X, rows of width V: in two terms, or v itself without the delta rule.
    """

    def step(chunk: Chunk, scratch: Scratch) -> Update:
        f, shape, written = chunk.factors, chunk.values.shape, [chunk.values]
        if f.inverse:
            written = scratch.held
            read = _scale(f.k_in.by, matmul(shape, *terms(f.read_keys, scratch.state)))
            store(_scale(f.beta, load(chunk.values) - read), *written)
            plgpu.commit_smem()
            x = matmul(shape, *terms(f.inverse, written))
            plgpu.commit_smem()  # Every warp has read the tiles that are written next.
            store(x, *written)
            plgpu.commit_smem()
            scratch.keep()
        o = matmul(shape, *terms(f.scores, written))
        o += _scale(f.q_in.by, matmul(shape, *terms(f.q_in.rows, scratch.state[:1])))
        plgpu.commit_smem()
        if f.k_out.by is not None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store(_scale(f.k_out.by, sum(map(load, written[1:]), start=load(written[0]))), *written)
        scratch.give(o)
        return terms(flips(f.k_out.rows), written)

    o, final, states, x = _carry(step, Chunk(f, v), initial, keep=keep)
    return o, final, states, x or (v,)


def backward(
    f: Factors, d_o: Array, d_final: Array | None, *, keep: int, to_initial: bool
) -> tuple[Array, Array | None, Array, Terms]:
    """The gradients of the values, bfloat16, and, where wanted, of the initial state, those of the states that leave every `keep`-th chunk
    [B, H, N / keep, K, V] bfloat16, and Y in two terms, none without the delta rule. Arguments are as those of `forward`."""

    def step(chunk: Chunk, scratch: Scratch) -> Update:
        f, d_o, shape, updates = chunk.factors, chunk.values, chunk.values.shape, []
        d_x = matmul(shape, *terms(flips(f.scores), [d_o]))
        d_x += _scale(f.k_out.by, matmul(shape, *terms(f.k_out.rows, scratch.state)))
        if f.inverse:
            store(d_x, *scratch.held)
            plgpu.commit_smem()
            y = matmul(shape, *terms(flips(f.inverse), scratch.held))
            plgpu.commit_smem()  # Every warp has read the tiles that are written next.
            store(y, *scratch.held)
            plgpu.commit_smem()
            scratch.keep()
            d_x = _scale(f.beta, y)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store(_scale(f.k_in.by, -d_x), *scratch.held)
            updates = terms(flips(f.read_keys), scratch.held)
        plgpu.commit_smem()
        if f.q_in.by is not None:
            store(_scale(f.q_in.by, load(d_o)), d_o)
        scratch.give(d_x)
        return [*terms(flips(f.q_in.rows), [d_o]), *updates]

    return _carry(step, Chunk(f, d_o), d_final, keep=keep, last=to_initial, reverse=True)


def _carry(
    step: Callable[[Chunk, Scratch], Update],
    given: Chunk,
    initial: Array | None,
    *,
    keep: int,
    last: bool = True,
    reverse: bool = False,
) -> tuple[Array, Any, Any, Terms]:
    """What the steps give, the last state if wanted, the states before the steps if they are kept, and what the steps hold."""
    (batch, heads, chunks, key_dim), value_dim = given.factors.decay.shape, given.values.shape[-1]
    leaves, tree = jax.tree.flatten(given)  # The values come last.
    before = () if initial is None else (initial,)
    num_terms = 2 if given.factors.inverse else 1
    num_held = num_terms if num_terms > 1 else 0
    width, ahead = _fit(leaves, key_dim, num_terms, num_held)

    def kernel(*refs: Ref) -> None:
        first, refs = refs[: len(before)], refs[len(before) :]
        ins, outs, (states, row_tiles) = refs[: len(leaves)], refs[len(leaves) : -2], refs[-2:]
        (o_ref, *final_ref), kept = outs[: 1 + last], outs[1 + last :]
        states_ref, held_refs = kept[0] if keep else None, kept[1:]
        b, h, j = (jax.lax.axis_index(name) for name in "bhj")
        columns = pl.ds(j * width, width)
        chunk = (lambda n: chunks - 1 - n) if reverse else (lambda n: n)

        def spec(x: Array, values: bool) -> Any:
            if x.dtype == F32:
                return plgpu.BlockSpec((1, None, None, x.shape[3]), lambda n: (0, b * heads + h, chunk(n), 0))
            if x.ndim == 5:
                return plgpu.BlockSpec(
                    (1, None, None, CHUNK, CHUNK),
                    lambda n: (0, b * heads + h, chunk(n), 0, 0),
                    transforms=tile(CHUNK, CHUNK, like=width).transforms,
                )
            size, head, column = (width, h, j) if values else (key_dim, key_head(x, h, heads), 0)
            transforms = tile(CHUNK, size, like=width).transforms
            where = lambda n: (0, b * chunks + chunk(n), head, column)
            return plgpu.BlockSpec((1, CHUNK, None, size), where, transforms=transforms)

        def advance(place: tuple[Any], *args: Any) -> Array:
            *tiles, state = args
            zero, n = zero_of(jax.tree.unflatten(tree, tiles).factors.decay.at[0]), chunk(place[0])
            own = jax.tree.unflatten(tree, [x.at[zero] for x in tiles])
            state_smem, held = ([x.at[zero + i] for i in range(x.shape[0])] for x in (states, row_tiles))
            out = held.pop()
            store(state, *state_smem)
            plgpu.commit_smem()
            if states_ref is not None:
                where = at(states_ref, b, h, jax.lax.div(n, jnp.int32(keep)), columns)
                copy = partial(plgpu.copy_smem_to_gmem, state_smem[0], where)
                pl.when(jax.lax.rem(place[0], jnp.int32(keep)) == 0)(copy)

            def keep_held() -> None:
                for term, ref in zip(held, held_refs, strict=False):
                    plgpu.copy_smem_to_gmem(term, at(ref, b, h, n, columns))

            def give(result: Array) -> None:
                store(result, out)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, at(o_ref, b, h, n, columns))

            update = step(own, Scratch(state_smem, held, keep_held, give))
            (state,) = accumulate((by_row(own.factors.decay, width) * state, update))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()  # Nothing still reads the tiles when the pipeline fills them again.
            return state

        pipeline = plgpu.emit_pipeline(
            advance,
            grid=(chunks,),
            in_specs=[spec(x, i == len(leaves) - 1) for i, x in enumerate(leaves)],
            max_concurrent_steps=ahead,
            init_carry=load(first[0].at[b, h, :, columns]) if first else full((key_dim, width), 0),
        )
        final = pipeline(*ins)

        def give_final(final_tile: Ref) -> None:
            final_tile[...] = final
            send((final_tile, final_ref[0].at[b, h, :, columns]))

        if last:
            pl.run_scoped(give_final, tile(key_dim, width, dtype=F32))  # Where the pipeline had its tiles.

    rows = jax.ShapeDtypeStruct(given.values.shape, BF16)
    outputs = [rows, *[jax.ShapeDtypeStruct((batch, heads, key_dim, value_dim), F32)] * last]
    if keep:
        outputs += [jax.ShapeDtypeStruct((batch, heads, chunks // keep, key_dim, value_dim), BF16)] + [rows] * num_held
    out = call(
        kernel,
        name=f"carry{'_delta' if num_held else ''}{'_back' if reverse else ''}",
        out_type=outputs,
        grid=(batch, heads, value_dim // width),
        grid_names=tuple("bhj"),
        scratch_types=[tile(num_terms, key_dim, width), tile(num_held + 1, CHUNK, width)],
    )(*before, *map(one_row, leaves))
    (o, *final), kept = out[: 1 + last], out[1 + last :]
    return o, final[0] if last else None, kept[0] if keep else None, tuple(kept[1:])


def _fit(leaves: list[Array], key_dim: int, num_terms: int, num_held: int) -> tuple[int, int]:
    """The columns of the state in one program, and how many chunks are filled ahead."""
    widest = 0
    for width in (64, 32, 16):
        rows = [x.shape[-1] for x in leaves[:-1] if x.dtype == BF16] + [width]
        lines = [x.shape[-1] for x in leaves if x.dtype == F32]
        chunk_bytes = 2 * CHUNK * sum(rows) + 4 * sum(lines)
        fitting = (MAX_SMEM - _SPARE - 2 * width * (num_terms * key_dim + (1 + num_held) * CHUNK)) // chunk_bytes
        if width * key_dim <= _STATE and fitting > 1:
            return width, min(4, fitting, max(2, _IN_FLIGHT // chunk_bytes))
        if width * key_dim <= _STATE and fitting == 1:
            widest = widest or width
    return widest, 1
