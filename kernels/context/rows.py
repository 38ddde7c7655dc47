"""Implied attention of linear recurrences on parts of sequences: readers walk back from part to part (see `recurrence.implied_rows`)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.context import ContextRule, Parts, ends

Array = jax.Array


def _run(
    op: Callable[..., tuple[Array, Array]],
    parts: Parts,
    rows: Array,
    q: Array,
    k: Array,
    g: Array | None,
    *beta: Array,
    segment_ids: Array | None,
    **options: Any,
) -> tuple[Array, Array]:
    """Each row is read at home first; with what then goes on to the left, and what each part makes of any reader, all parts learn
    who reads them."""
    batch, length, _, key_dim = k.shape
    heads = beta[0].shape[2] if g is None else g.shape[2]
    own = rows - parts.index * length
    own = jnp.where((own >= 0) & (own < length), own, -1)
    beyond = jnp.full(key_dim, -1, own.dtype)
    inputs = (q, k, g, *beta)
    options = {**options, "segment_ids": segment_ids}
    nothing = jnp.zeros((batch, heads, rows.shape[0], key_dim), jnp.float32)
    each = jnp.broadcast_to(jnp.eye(key_dim), (batch, heads, key_dim, key_dim))
    _, left = op(jnp.concatenate([own, beyond]), *inputs, reader=jnp.concatenate([nothing, each], axis=2), **options)
    ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
    readers = _compose(parts, left, rows.shape[0], ends(ids))
    return op(own, *inputs, reader=readers, **options)


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


CONTEXT = ContextRule(_run, lambda count, *args, **options: None)
