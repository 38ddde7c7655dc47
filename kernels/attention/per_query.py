"""What flash attention does for each query row outside its kernels, on every platform: sink logits, and cotangents of the rows.

The backward kernels recompute the weights A from lse and need one form for all statistics:
  dz_j = A_j (do . v_j + [j is first] dfirst + c1 - c log A_j) + [z_j = max] dmax
The rows c1, c, dfirst and dmax are made here.

The sigmoid's weights may be too small for float32 where their shares are not. With statistics its kernels therefore keep
W_j = A_j / a, with a the row sum where that is below 1, else 1, and logarithms less the bias, beside which they would be rounded; they
read a do in place of do, and
  dz_j = (1 - a W_j) W_j (a do . v_j + [j is first] dfirst + c1 - c log W_j) + [z_j = max] dmax
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from plait.kernels.attention.call import AttentionCall
from plait.kernels.attention.reference import MASKED as HIDDEN
from plait.kernels.attention.reference import capped
from plait.kernels.attention.ties import under_cap
from plait.kernels.shapes import matmul_precision
from plait.kernels.tokens import Tokens

Array = jax.Array


def with_bias(rows: Sequence[Array], bias: Array) -> tuple[Array, ...]:
    """The rows of a sigmoid's kernel with statistics, [B, H, T], the lse no more less the bias [H]."""
    lse = rows[0]
    return jnp.where(lse > HIDDEN / 2, lse + bias[None, :, None], HIDDEN), *rows[1:]


def gradient_rows(
    rows: Sequence[Array],
    d_rows: Sequence[Array],
    delta: Array,
    *,
    sigmoid_bias: Array | None = None,
    near: Callable[[], Array],
    soft_cap: float | None = None,
) -> list[Array]:
    """The rows that the backward kernels read: lse (of the sigmoid with statistics log a, less the bias), c1 and, with statistics, c,
    dfirst, dmax, the logit from which dmax applies and, for the sigmoid, a.

    Args:
      rows: what the forward kernel gave, [B, H, T] each: lse (of the sigmoid with statistics less the bias) and, with statistics,
        maximum, entropy and perhaps first mass, without which dfirst is left out.
      d_rows: their cotangents.
      delta: sum of do o over the values of each row.
      sigmoid_bias: [H], of the sigmoid, whose weights are not normalised.
      near: makes `ties`, of the rows' shape: logits so close to the row's maximum get its gradient.
      soft_cap: of the logits.
    """
    lse, d_lse, sigmoid = rows[0], d_rows[0], sigmoid_bias is not None
    if len(rows) == 1:
        return [lse, jnp.zeros_like(lse) if sigmoid else d_lse - delta]
    seen = lse > HIDDEN / 2
    base = lse if sigmoid_bias is None else jnp.minimum(lse, -sigmoid_bias[None, :, None])
    inverse = jnp.where(seen, jnp.exp(base - lse), 0)
    c1 = d_lse * inverse if sigmoid else d_lse - delta  # only a normalised row subtracts delta_i = sum_j A_ij do_i . v_j
    peak, entropy, *firsts = rows[1:]
    d_peak, d_entropy, *d_firsts = d_rows[1:]
    c, d_firsts = d_entropy * inverse, [d * inverse for d in d_firsts]
    c1 += jnp.where(seen, c * (lse - base - entropy) - sum(d * first for d, first in zip(d_firsts, firsts)), 0)
    edge = jnp.where(seen, peak - under_cap(near(), peak, soft_cap), -HIDDEN)
    return [
        base,
        c1,
        c,
        *d_firsts,
        d_peak,
        edge,
        *([] if sigmoid_bias is None else [jnp.exp(base + sigmoid_bias[None, :, None])]),
    ]


def first_mass(call: AttentionCall, lse: Array, queries: Tokens, keys: Tokens, *, position: int = 0) -> Array:
    """The weight [B, T, H] of each row on its segment's token at `position`, from the row's lse and one score: no kernel looks for it.

    Args:
      call: whose weights are wanted.
      lse: [B, T, H] float32; with sink logits in it the weights are those beside a sink.
      queries: where the queries are, int32 [B or 1, T]; one row is one segment where the keys are their own tokens.
      keys: likewise, [B or 1, S].
    """
    q, k = call.q, call.k
    index = _keys_at(position, queries, keys, call.own_keys)  # [B or 1, T]
    at = jnp.broadcast_to(index, (k.shape[0], index.shape[1]))[:, :, None, None]
    first = jnp.take_along_axis(k, at, axis=1)  # [B, T, Hkv, K]
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    z = jnp.einsum("btgrk,btgk->btgr", grouped, first, precision=matmul_precision(q.dtype), preferred_element_type=jnp.float32)
    z = call.scale * z.reshape(lse.shape)
    if call.bias is not None:
        z += jnp.moveaxis(call.bias.at(queries.positions - position), 0, -1)
    z = capped(z, call.logit_soft_cap)
    ids, positions = (jnp.take_along_axis(x, index, axis=1) for x in (keys.segment_ids, keys.positions))
    visible = (
        (ids == queries.segment_ids) & (ids != 0) & (positions == position) & call.mask.reaches(queries.positions, positions)
    )
    visible = visible[:, :, None] & (lse > HIDDEN / 2)
    if call.selected is not None:
        shown = call.selected.shows(position)
        visible &= jnp.repeat(shown, q.shape[2] // shown.shape[2], axis=2)
    if call.sigmoid:
        z = jax.nn.log_sigmoid(z + call.sigmoid_bias.reshape(1, 1, -1))
    return jnp.where(visible, jnp.exp(jnp.where(visible, z - lse, 0)), 0)


def _keys_at(position: int, queries: Tokens, keys: Tokens, own_keys: bool) -> Array:
    """int32 [B or 1, T]: where the token at `position` of each query's segment is, or any index where there is none."""
    if own_keys:
        return jnp.minimum(queries.starts() + position, keys.positions.shape[1] - 1)
    found = jnp.where(keys.positions == position, keys.segment_ids, jnp.iinfo(jnp.int32).max)
    order = jnp.argsort(found, axis=1)
    ranked = jnp.take_along_axis(found, order, axis=1)
    rank = jax.vmap(jnp.searchsorted)(ranked, queries.segment_ids)
    return jnp.take_along_axis(order, jnp.minimum(rank, found.shape[1] - 1), axis=1)


def with_sinks(o: Array, rows: Sequence[Array], sinks: Array) -> tuple[Array, list[Array]]:
    """o [B, T, H, V] and its rows [B, T, H] after sink logits [B or 1, T or 1, H] join the denominators: all shrink by the share of the
    keys."""
    sinks = sinks.astype(jnp.float32)
    share = jax.nn.sigmoid(rows[0] - sinks)
    rest = [*rows[1:3], *(first * share for first in rows[3:])]
    return (o * share[..., None]).astype(o.dtype), [jnp.logaddexp(rows[0], sinks), *rest]
