"""Many small systems of equations with symmetric positive matrices, in plain operations.

LAPACK's share one pool of threads among the devices of a CPU and wait in it for each other; several devices at once can stand still. On TPU
its place is taken by loops as these.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def positive_solve(a: jax.Array, b: jax.Array) -> jax.Array:
    """x `[..., K]` with `a x = b`, for symmetric positive definite `a` `[..., K, K]` and `b` `[..., K]`, by elimination without pivots (the
    sweep operator, Goodnight 1979) and one step of refinement. Gradients solve with the same inverse."""
    inverse = _inverse(jax.lax.stop_gradient(a))

    def solve(times: object, b: jax.Array) -> jax.Array:
        x = _times(inverse, b)
        return x + _times(inverse, b - _times(jax.lax.stop_gradient(a), x))

    return jax.lax.custom_linear_solve(functools.partial(_times, a), b, solve, symmetric=True)


def _times(a: jax.Array, x: jax.Array) -> jax.Array:
    return (a * x[..., None, :]).sum(-1)


def _inverse(a: jax.Array) -> jax.Array:
    channels = jnp.arange(a.shape[-1])

    def sweep(i: jax.Array, a: jax.Array) -> jax.Array:
        here = channels == i
        row, column = (jax.lax.dynamic_index_in_dim(a, i, axis, keepdims=True) for axis in (-2, -1))
        pivot = jax.lax.dynamic_index_in_dim(row, i, -1, keepdims=True)
        swept = jnp.where(here[:, None], row / pivot, a - column * row / pivot)
        return jnp.where(here, jnp.where(here[:, None], 1, -column) / pivot, swept)

    return jax.lax.fori_loop(0, a.shape[-1], sweep, a)
