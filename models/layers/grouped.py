"""Products of rows with the matrix of the group they are in."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from plait.kernels.target import current

GROUPED = "grouped_dot"
"""The name under which recomputation knows the products."""
_BLOCK = 128  # rows of one product where there is no kernel


def grouped_dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """`y_i = x_i W_g` of rows `[N, K]` that lie group after group, `[N, F]` in x's dtype; rows behind the last group give 0.

    TPUs compile `jax.lax.ragged_dot` to a kernel that costs what the rows in groups cost. Elsewhere XLA makes of it a product of every
    row with every group's matrix; there the rows go block by block, as many blocks as the groups have.

    Args:
        x: `[N, K]`.
        w: `[G, K, F]`.
        sizes: int32 `[G]`, rows of each group; their sum is at most N.
    """
    chip = current()
    product = _ragged if chip is not None and chip.platform == "tpu" else _blocks
    return checkpoint_name(product(x, w, sizes), GROUPED)


def _ragged(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    y = jax.lax.ragged_dot(x, w, sizes)
    return jnp.where(_in_groups(x.shape[0], sizes), y, 0)


def _in_groups(rows: int, sizes: jax.Array) -> jax.Array:
    return (jnp.arange(rows, dtype=jnp.int32) < sizes.sum())[:, None]


@jax.custom_vjp
def _blocks(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    block = min(_BLOCK, x.shape[0])
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def product(i: jax.Array, y: jax.Array) -> jax.Array:
        group, start, _ = find(i)
        rows = jax.lax.dynamic_slice_in_dim(padded, start, block)
        # Rows of the next group that end up in a group's last block are overwritten by that group's first.
        return jax.lax.dynamic_update_slice_in_dim(y, rows @ w[group], start, 0)

    count, find = _plan(sizes, block)
    y = jax.lax.fori_loop(0, count, product, jnp.zeros((padded.shape[0], w.shape[2]), x.dtype))[: x.shape[0]]
    return jnp.where(_in_groups(x.shape[0], sizes), y, 0)


def _blocks_forward(x: jax.Array, w: jax.Array, sizes: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _blocks(x, w, sizes), (x, w, sizes)


def _blocks_backward(residuals: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = residuals
    block = min(_BLOCK, x.shape[0])
    x_padded, dy_padded = (jnp.pad(a, ((0, block), (0, 0))) for a in (x, dy))
    count, find = _plan(sizes, block)

    def add(i: jax.Array, dw: jax.Array) -> jax.Array:
        group, start, length = find(i)
        own = (jnp.arange(block) < length)[:, None]
        rows, drows = (jnp.where(own, jax.lax.dynamic_slice_in_dim(a, start, block), 0) for a in (x_padded, dy_padded))
        return dw.at[group].add(jnp.matmul(rows.T, drows, preferred_element_type=jnp.float32))

    dw = jax.lax.fori_loop(0, count, add, jnp.zeros(w.shape, jnp.float32))
    return _blocks(dy, w.swapaxes(1, 2), sizes), dw.astype(w.dtype), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _plan(sizes: jax.Array, block: int) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]]:
    """How many blocks of rows there are, none with rows of two groups, and what tells of one its group, its first row and its rows."""
    blocks = -(-sizes // block)
    last, ends = jnp.cumsum(blocks), jnp.cumsum(sizes)

    def find(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        group = (last <= i).sum()
        start = ends[group] - sizes[group] + block * (i - last[group] + blocks[group])
        return group, start, ends[group] - start

    return last[-1], find
