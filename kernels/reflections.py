"""Triangles and orthonormal rows of many small matrices by reflections, in plain operations.

LAPACK's calls share one pool of threads among the devices of a CPU and wait in it for each other: several devices at once can stand still.
Source: Householder, Unitary triangularization of a nonsymmetric matrix (J. ACM 5(4), 1958).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def lower_triangle(x: jax.Array) -> jax.Array:
    """The lower triangle L `[..., N, R]` float32, R = min(N, M), of `x` `[..., N, M]` `= L Q` with orthonormal rows Q `[R, M]`; a column's
    sign is free. Whatever is multiplied from the left, `x` and L then have the same singular values. Not to be differentiated."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    size = min(x.shape[-2:])

    def next_row(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x = mirrored(*carry)
        return x, mirror(x, i + 1, i + 1)

    made, _ = jax.lax.fori_loop(0, size, next_row, (x, mirror(x, 0, 0)))
    return jnp.tril(made[..., :size])


def orthonormal_rows(x: jax.Array) -> jax.Array:
    """Q `[..., N, M]` float32 of `x` `[..., N, M]` `= L Q`, N at most M, with orthonormal rows and no diagonal entry of the triangle L below
    0: of normal numbers uniform among all such Q. Not to be differentiated."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    size = x.shape[-2]

    def next_row(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, normals = carry
        x = mirrored(x, jax.lax.dynamic_index_in_dim(normals, i, -2, keepdims=False))
        following = mirror(x, i + 1, i + 1)  # of the last row there is none: what is written beyond it is never read
        return x, jax.lax.dynamic_update_index_in_dim(normals, following, i + 1, normals.ndim - 2)

    normals = jnp.zeros((*x.shape[:-2], size + 1, x.shape[-1]), jnp.float32).at[..., 0, :].set(mirror(x, 0, 0))
    triangle, normals = jax.lax.fori_loop(0, size, next_row, (x, normals))

    def undo(i: jax.Array, rows: jax.Array) -> jax.Array:
        return mirrored(rows, jax.lax.dynamic_index_in_dim(normals, size - 1 - i, -2, keepdims=False))

    signs = jnp.where(jnp.diagonal(triangle, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
    return jax.lax.fori_loop(0, size, undo, jnp.broadcast_to(jnp.eye(size, x.shape[-1]), x.shape)) * signs[..., None]


def mirror(x: jax.Array, row: jax.Array | int, column: jax.Array | int) -> jax.Array:
    """The normal `[..., M]` of the reflection of rows of `x` `[..., N, M]` that leaves what is before `column`, and moves all of `row` from
    there on into it.

    Loops carry it from where it is found to where it is used: a row of roundings, computed twice in another order, is not the same, and
    what it is divided by would not be its norm."""
    own = jax.lax.dynamic_index_in_dim(x, row, -2, keepdims=False)
    columns = jax.lax.broadcasted_iota(jnp.int32, own.shape, own.ndim - 1)
    rest = jnp.where(columns >= column, own, 0.0)
    largest = jnp.abs(rest).max(-1, keepdims=True)
    rest = rest / jnp.where(largest > 0, largest, 1.0)  # the squares of small rows would be 0
    head = jnp.where(columns == column, rest, 0.0).sum(-1, keepdims=True)
    norm = jnp.sqrt(jnp.square(rest).sum(-1, keepdims=True))
    return rest + jnp.where(columns == column, jnp.where(head < 0, -norm, norm), 0.0)


def mirrored(x: jax.Array, normal: jax.Array) -> jax.Array:
    """The rows of `x` `[..., N, M]`, reflected by the `normal` `[..., M]`; one of zeros leaves them."""
    square = jnp.square(normal).sum(-1, keepdims=True)
    share = normal * jnp.where(square > 0, 2 / jnp.where(square > 0, square, 1.0), 0.0)
    return x - (x * normal[..., None, :]).sum(-1, keepdims=True) * share[..., None, :]
