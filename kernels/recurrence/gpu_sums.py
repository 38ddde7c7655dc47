"""What a chunk's gradients sum over the values in the Hopper kernels of the linear recurrences.

With dO, X, Y, S and Z as in `gpu_carry`, over all columns of the values,

    dQ_in = dO S^T      dK_out = X Z^T      dK_in = -Diag(b) Y S^T      dA = dO X^T      dd = sum_v S Z

and with the delta rule -Diag(b) Y X^T is the gradient of the scores of keys, whose diagonal gives that of b. A program works on a pair of
chunks, one a warpgroup, and a block of the channels of keys. Where memory holds but the state that enters a pair and the gradient of
the one that leaves it, the warpgroups make the two between them again, block of columns by block:

    Z_n = Diag(d_m) Z_m + Q_in,m^T dO_m - K_in,m^T Diag(b_m) Y_m        S_m = Diag(d_n) S_n + K_out,n^T X_n        m = n + 1
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels import gpu
from plait.kernels.recurrence.gpu_chunk import (
    BLOCK,
    CHUNK,
    PAIR,
    SQUARE,
    Factors,
    Ref,
    accumulate,
    at,
    by_row,
    flip,
    flips,
    key_head,
    load,
    store,
    terms,
    tile,
)

Array = jax.Array

WARPGROUPS = "w"
"""The axis of the two warpgroups, one a chunk of the pair."""

STAGES = 3
"""Blocks of columns in shared memory, one of which is being filled."""


class Making(NamedTuple):
    """Decayed rows [C, BLOCK] of a block of channels, in the terms of which the missing matrices are made."""

    q_in: list[Ref]
    """Of the later chunk."""
    k_in: list[Ref]
    """Likewise, times -beta."""
    k_out: list[Ref]
    """Of the earlier chunk."""


class Sums(NamedTuple):
    """What is summed over the values, for every chunk."""

    factors: Factors
    values: tuple[Array, ...]
    """Rows of width V, bfloat16: dO, the terms of X and those of Y."""
    states: Array
    """[B, H, N, K, V] bfloat16, entering; or [B, H, N / 2, K, V], those that enter the pairs."""
    d_states: Array
    """[B, H, N, K, V] bfloat16, the gradients of the leaving ones; or [B, H, N / 2, K, V], of those that leave the pairs."""

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
        return self.factors.decay.shape[:3]

    @property
    def grid(self) -> tuple[int, ...]:
        """B, H, pairs of chunks and blocks of the channels of keys."""
        batch, heads, chunks, key_dim = self.factors.decay.shape
        return batch, heads, chunks // PAIR, key_dim // BLOCK

    @property
    def made(self) -> bool:
        """Whether every second matrix is made again."""
        return self.states.shape[2] < self.factors.decay.shape[2]

    @property
    def inputs(self) -> tuple[tuple[Array, ...], Factors | None]:
        """What `kernel` reads and what is made from."""
        given = *self.values, self.states, self.d_states
        return given, self.factors._replace(scores=(), inverse=()) if self.made else None

    def kernel(self, refs: Sequence[Ref], factors: Any, place: tuple[Array, ...], w: Array) -> list[Array]:
        """dd, dQ_in, dK_out, dA and, with the delta rule, Y S^T and Y X^T, of one chunk of a pair, for a block of keys' channels.

        Args:
          refs: of `inputs`, as `factors`.
          factors: see there.
          place: in `grid`.
          w: the chunk in the pair.
        """
        (*values, states, d_states), num_values, made = refs, len(self.values), self.made
        b, h, pair, i = place
        block, width = pl.ds(i * BLOCK, BLOCK), BLOCK // self.num_terms
        steps = self.states.shape[-1] // width
        each = 1 if made else PAIR  # matrices of a kind for a pair

        def body(rows: list[Ref], matrices: Ref, making: Making, filled: Ref, free: Ref) -> list[Array]:
            ring = gpu.Ring((*rows, *(matrices.at[pl.ds(p * STAGES, STAGES)] for p in range(2 * each))), filled, free)

            def fill(step: Array) -> None:
                columns, tokens = pl.ds(step * width, width), pl.ds(pair * (PAIR * CHUNK), PAIR * CHUNK)
                places = [x.at[b, h, pair * each + p, block, columns] for x in (states, d_states) for p in range(each)]
                ring.fill(step, *(x.at[b, tokens, h, columns] for x in values), *places)

            @pl.when(w == 0)
            def _start() -> None:
                for step in range(min(STAGES - 1, steps)):
                    fill(jnp.int32(step))

            if made:
                own_decay = gpu.load(factors.decay.at[b, h, PAIR * pair + 1 - w, block], 0)
                self._scale(factors, making, (b, h, pair, block), w)

            def make(parts: list[Ref]) -> None:
                """Leaves the matrix that is missing in its place."""
                decay = gpu.rows_to(own_decay, width)
                of = lambda x, n: [t.at[pl.ds(n * CHUNK, CHUNK)] for t in x]
                x, y = parts[1 : 1 + self.num_terms], parts[1 + self.num_terms : num_values]

                @pl.when(w == 0)
                def _gradient() -> None:
                    pairs = [*terms(flips(making.q_in), of(parts[:1], 1)), *terms(flips(making.k_in), of(y, 1))]
                    store(*accumulate((decay * load(parts[-1]), pairs)), matrices.at[2 * STAGES])

                @pl.when(w == 1)
                def _state() -> None:
                    pairs = terms(flips(making.k_out), of(x, 0))
                    store(*accumulate((decay * load(parts[-2]), pairs)), matrices.at[2 * STAGES + 1])

                plgpu.commit_smem()

            def add(step: Array, sums: list[Array]) -> list[Array]:
                pl.when((w == 0) & (step + STAGES - 1 < steps))(lambda: fill(step + STAGES - 1))
                parts = ring.read(step)
                d_o, *others = (x.at[pl.ds(w * CHUNK, CHUNK)] for x in parts[:num_values])
                x, y, slot = others[: self.num_terms], others[self.num_terms :], ring.slot(step)
                if made:
                    make(parts)
                    state, d_state = jnp.where(w == 0, slot, 2 * STAGES + 1), jnp.where(w == 0, 2 * STAGES, STAGES + slot)
                else:
                    state, d_state = w * STAGES + slot, (PAIR + w) * STAGES + slot
                state, d_state = matrices.at[state], matrices.at[d_state]
                pairs = [terms([d_o], [flip(state)]), terms(x, [flip(d_state)]), terms([d_o], flips(x))]
                if y:
                    pairs += [terms(y, [flip(state)]), terms(y, flips(x))]
                decay, *products = sums
                decay += jnp.sum(load(state) * load(d_state), axis=1)
                products = accumulate(*zip(products, pairs, strict=True))
                plgpu.commit_smem()  # Nothing still reads the tiles when they are filled again.
                ring.release(step)
                return [decay, *products]

            zeros = [gpu.full((BLOCK,), 0), *[gpu.full(SQUARE, 0)] * (5 if self.delta else 3)]
            sums = jax.lax.fori_loop(0, steps, add, zeros)
            pl.when(w == 0)(lambda: ring.drain(jnp.int32(steps)))
            return sums

        row, num_terms = tile(CHUNK, BLOCK, like=width), self.num_terms
        making = Making([row], [row] * num_terms * self.delta, [row] * num_terms) if made else Making([], [], [])
        return pl.run_scoped(
            body,
            [tile(STAGES, PAIR * CHUNK, width)] * num_values,
            tile(2 * each * STAGES + PAIR * made, BLOCK, width),
            making,
            plgpu.Barrier(num_arrivals=num_values + 2 * each, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=PAIR, num_barriers=STAGES),
            collective_axes=WARPGROUPS,
        )

    def _scale(self, f: Factors, making: Making, place: tuple[Any, ...], w: Array) -> None:
        """Leaves the rows that a warpgroup makes its matrix from in their tiles."""
        b, h, pair, block = place
        earlier, later = PAIR * pair, PAIR * pair + 1

        def scaled(rows: Sequence[Ref], by: Ref | None, n: Array) -> Array:
            first, *others = (load(at(x, b, key_head(x, h, self.chunks[1]), n, block)) for x in rows)
            x = sum(others, start=first)
            return x if by is None else by_row(by.at[b, h, n]) * x

        @pl.when(w == 0)
        def _of_later() -> None:
            store(scaled(*f.q_in, later), *making.q_in)
            if self.delta:
                store(by_row(f.beta.at[b, h, later]) * -scaled(f.read_keys, f.k_in.by, later), *making.k_in)

        @pl.when(w == 1)
        def _of_earlier() -> None:
            store(scaled(*f.k_out, earlier), *making.k_out)

        plgpu.commit_smem()
