"""Singular values of many small matrices, in plain operations, for the reason that `reflections` gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from plait.kernels.reflections import lower_triangle, mirror, mirrored

_WAYS = 32
"""Parts into which a round of `_bisected` cuts an interval."""
_ROUNDS = 5
"""`_WAYS**_ROUNDS` parts of the first interval are finer than float32."""


def singular_values(x: jax.Array) -> jax.Array:
    """The singular values of `x` `[..., N, M]`, float32 `[..., min(N, M)]`, the largest first.

    Errors are a few roundings of the largest, as by any backward stable method. Not to be differentiated.
    Source: bidiagonalisation by Householder reflections after a triangle is made (Golub and Kahan 1965; Chan 1982), then bisection by the
    counts of the differential stationary qd transform (Fernando and Parlett 1994).
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    x = x if x.shape[-2] <= x.shape[-1] else jnp.swapaxes(x, -1, -2)
    largest = jnp.abs(x).max((-2, -1), keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1.0)
    diagonal, below = _bidiagonal(x if x.shape[-2] == x.shape[-1] else lower_triangle(x))
    return _bisected(diagonal, below) * largest[..., 0]


def _bidiagonal(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Diagonal `[..., N]` and what is below it `[..., N - 1]` of a matrix that has entries nowhere else and the singular values of `x`
    `[..., N, N]`: in turn a row is emptied from the right, and a column from below, which is a row of the transpose."""

    def turn(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x = jnp.swapaxes(mirrored(*carry), -1, -2)
        row = (i + 1) // 2
        return x, mirror(x, row, row + (i + 1) % 2)

    x, _ = jax.lax.fori_loop(0, 2 * x.shape[-1], turn, (x, mirror(x, 0, 0)))
    return jnp.diagonal(x, axis1=-2, axis2=-1), jnp.diagonal(x, offset=-1, axis1=-2, axis2=-1)


def _bisected(diagonal: jax.Array, below: jax.Array) -> jax.Array:
    """Singular values of bidiagonal matrices by how many of them are below each of several numbers, round by round."""
    size = diagonal.shape[-1]
    squares = jnp.square(diagonal)
    beside = jnp.pad(jnp.square(below), [(0, 0)] * (below.ndim - 1) + [(0, 1)])
    most = jnp.sqrt(squares.sum(-1) + beside.sum(-1))  # the root of the sum of all squares
    steps = (jnp.moveaxis(squares, -1, 0), jnp.moveaxis(beside, -1, 0))
    inner = jnp.arange(1, _WAYS) / _WAYS
    order = jnp.arange(size, 0, -1)

    def below_of(numbers: jax.Array) -> jax.Array:
        """How many singular values are below each, int32."""
        shift = jnp.square(numbers)

        def step(carry: tuple[jax.Array, jax.Array], of: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], None]:
            t, count = carry
            square, side = (jnp.broadcast_to(one[..., None, None], t.shape) for one in of)
            pivot = square + t
            pivot = jnp.where(jnp.abs(pivot) < 1e-30, -1e-30, pivot)
            return (t * (side / pivot) - shift, count + (pivot < 0)), None

        (_, count), _ = jax.lax.scan(step, (-shift, jnp.zeros(numbers.shape, jnp.int32)), steps)
        return count

    def narrow(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, width = ends
        numbers = low[..., None] + width[..., None] * jnp.broadcast_to(inner, (*low.shape, len(inner)))
        at_most = below_of(numbers) < jnp.broadcast_to(order[:, None], numbers.shape)
        return low + width * (at_most.sum(-1) / _WAYS), width / _WAYS

    start = (jnp.zeros(diagonal.shape), jnp.broadcast_to(most[..., None], diagonal.shape))
    low, width = jax.lax.fori_loop(0, _ROUNDS, narrow, start)
    return low + 0.5 * width
