"""The implied attention of the diagonal plus rank one."""

import jax
import jax.numpy as jnp

from plait.kernels import chunking
from plait.kernels.chunking import dot
from plait.kernels.context.implied import CONTEXT
from plait.kernels.dispatch import in_parts
from plait.kernels.dplr import chunked
from plait.kernels.dplr.call import DPLRRowsCall
from plait.kernels.tokens import Tokens

Array = jax.Array


def dplr_rows(
    q: Array,
    k: Array,
    g: Array,
    a: Array,
    b: Array,
    rows: Array,
    *,
    scale: float | None = None,
    at: Tokens | None = None,
    chunk_size: int = 64,
) -> Array:
    """Rows of the implied attention: A with `o[:, rows] = A @ v` for `plait.kernels.dplr` from a zero initial state.

    Weights may be negative: what is moved along `a` may be erased. Costs O(R T K) and the chunk inverses.

    Args:
      q: [B, T, Hqk, K].
      k: [B, T, Hqk, K].
      g: [B, T, Hv, K] float32 log decay, at most 0.
      a: [B, T, Hqk, K].
      b: [B, T, Hqk, K].
      rows: int32 [R] token indices, may be traced.
      scale: multiplies q; None is K^-1/2.
      at: what is known of the tokens; None is one segment.
      chunk_size: tokens per chunk, a power of two.

    Returns:
      [B, Hv, R, T] float32, zero above the diagonal and across segments.

    Raises:
      ValueError: a shape does not fit.
    """
    call = DPLRRowsCall.of("dplr_rows", q=q, k=k, g=g, a=a, b=b, rows=rows, scale=scale, at=at, chunk_size=chunk_size)
    return in_parts(CONTEXT, _rows)(call)[0]


def _rows(call: DPLRRowsCall) -> tuple[Array, Array]:
    """A reader [K] a row walks the chunks backwards, as in `recurrence.implied_rows`.

    A chunk's leaving state holds its values by `k_out`, and by `b_out` what its tokens read along `a`: (I - a_b)^-1 of (a_k v + a_in S).
    """
    c, m = chunked.cut(call)
    batch, heads, chunks, size, key_dim = c.k.shape
    home, offset = call.rows // size, call.rows % size
    inverse = chunking.unit_lower_inverse(-m.a_b)
    by_value, by_state = dot("...ij,...jk->...ik", inverse, m.a_k), dot("...ij,...jk->...ik", inverse, m.a_in)
    of_rows = lambda x: x[:, :, home, offset]  # [B, H, R, ...]

    def visit(reader: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        number, k_out, b_out, decay, by_value, by_state = chunk
        here = (home == number)[None, None, :, None]
        read = jnp.where(here, of_rows(m.q_k), dot("bhck,bhrk->bhrc", k_out, reader))
        moved = jnp.where(here, of_rows(m.q_b), dot("bhck,bhrk->bhrc", b_out, reader))
        passed = jnp.where(here, of_rows(c.q_in), decay[:, :, None, :] * reader)
        return passed + dot("bhrc,bhck->bhrk", moved, by_state), read + dot("bhrc,bhcj->bhrj", moved, by_value)

    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (c.k_out, m.b_out, c.decay, by_value, by_state))
    nothing = jnp.zeros((batch, heads, call.rows.shape[0], key_dim), c.k.dtype)
    start = nothing if call.reader is None else call.reader.astype(nothing.dtype)
    left, weights = jax.lax.scan(visit, start, (jnp.arange(chunks), *inputs), reverse=True)
    weights = jnp.moveaxis(weights, 0, 3).reshape(batch, heads, call.rows.shape[0], -1)[..., : call.q.shape[1]]
    return weights, left
