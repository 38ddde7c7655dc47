"""Implied attention of linear recurrences on parts of sequences: readers walk back from part to part (see `recurrence.implied_rows`)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from plait.kernels.context import ContextRule, Parts, ends
from plait.kernels.recurrence import RowsCall

Array = jax.Array


def _run(op: Callable[[RowsCall], tuple[Array, Array]], parts: Parts, call: RowsCall) -> tuple[Array, Array]:
    """Each row is read at home first; with what then goes on to the left, and what each part makes of any reader, all parts learn
    who reads them."""
    rows, heads, (batch, length, _, key_dim) = call.rows, call.num_heads, call.k.shape
    own = rows - parts.index * length
    own = jnp.where((own >= 0) & (own < length), own, -1)
    beyond = jnp.full(key_dim, -1, own.dtype)
    nothing = jnp.zeros((batch, heads, rows.shape[0], key_dim), jnp.float32)
    each = jnp.broadcast_to(jnp.eye(key_dim), (batch, heads, key_dim, key_dim))
    _, left = op(call.replace(rows=jnp.concatenate([own, beyond]), reader=jnp.concatenate([nothing, each], axis=2)))
    readers = _compose(parts, left, rows.shape[0], ends(call.ids_of_all))
    return op(call.replace(rows=own, reader=readers))


def _compose(parts: Parts, left: Array, count: int, border: Array) -> Array:
    """The readers [B, H, R, K] that enter this part at its end.

    Args:
      left: [B, H, R + K, K], what leaves the part on the left: its own rows, and each unit reader that entered.
      count: R.
      border: [B, 2], the ids of its first and last real tokens.
    """

    def step(carry: tuple[Array, Array, Array], part: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array, Array], None]:
        reader, open_id, entering = carry
        number, left, border = part
        first, last = border[:, 0], border[:, 1]
        reader = jnp.where(((last == open_id) | (last == 0))[:, None, None, None], reader, 0)
        entering = jnp.where(number == parts.index, reader, entering)
        passed = left[:, :, :count] + jnp.einsum("bhrj,bhjk->bhrk", reader, left[:, :, count:], precision="highest")
        reader = jnp.where((last == 0)[:, None, None, None], reader, passed)
        return (reader, jnp.where(first > 0, first, open_id), entering), None

    nothing = jnp.zeros_like(left[:, :, :count])
    nobody = jnp.full(left.shape[:1], -1, border.dtype)
    every = (jnp.arange(parts.count), parts.stack(left), parts.stack(border))
    (_, _, entering), _ = jax.lax.scan(step, (nothing, nobody, nothing), every, reverse=True)
    return entering


CONTEXT = ContextRule(_run)
