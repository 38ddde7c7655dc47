"""What flash attention does for each query row outside its kernels, on every platform: sink logits, and cotangents of the rows.

The backward kernels recompute the weights A from lse and need one form for all statistics:
  dz_j = A_j (do . v_j + [j is first] dfirst + c1 - c e_j) + [z_j = max] dmax       (times 1 - A_j for the sigmoid)
with e_j = log A_j up to a constant of the row. The rows c1, c, dfirst and dmax are made here.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from plait.kernels.attention.reference import MASKED as HIDDEN

Array = jax.Array

_TIES = 1e-6
"""Logits this close to the row's maximum, relatively, get its gradient."""


def gradient_rows(rows: Sequence[Array], d_rows: Sequence[Array], delta: Array, *, sigmoid: bool) -> list[Array]:
    """The rows that the backward kernels read: lse, c1 and, with statistics, c, dfirst, dmax and the logit from which dmax applies.

    Args:
      rows: what the forward kernel gave, all of one shape: lse and, with statistics, maximum, entropy and first mass.
      d_rows: their cotangents.
      delta: sum of do o over the values of each row.
      sigmoid: the weights are not normalised.
    """
    lse, d_lse = rows[0], d_rows[0]
    seen = lse > HIDDEN / 2
    inverse = jnp.where(seen, jnp.exp(-jnp.where(seen, lse, 0)), 0) if sigmoid else seen.astype(jnp.float32)
    c1 = d_lse * inverse if sigmoid else d_lse - delta  # only a normalised row subtracts delta_i = sum_j A_ij do_i . v_j
    if len(rows) == 1:
        return [lse, c1]
    _, peak, entropy, first = rows
    _, d_peak, d_entropy, d_first = d_rows
    c, d_first = d_entropy * inverse, d_first * inverse
    c1 += jnp.where(seen, c * (lse - entropy) - d_first * first, 0)
    return [lse, c1, c, d_first, d_peak, jnp.where(seen, peak - _TIES * abs(peak), -HIDDEN)]


def with_sinks(o: Array, rows: Sequence[Array], sinks: Array) -> tuple[Array, list[Array]]:
    """o [B, T, H, V] and its rows [B, T, H] after sink logits [H] join the denominators: all shrink by the share of the keys."""
    sinks = sinks.astype(jnp.float32).reshape(1, 1, -1)
    share = jax.nn.sigmoid(rows[0] - sinks)
    rest = [*rows[1:3], *(first * share for first in rows[3:])]
    return (o * share[..., None]).astype(o.dtype), [jnp.logaddexp(rows[0], sinks), *rest]
