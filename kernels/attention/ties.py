"""Which logits pass for the largest of their row: a backward pass makes them again, and a product made again may differ by its roundings."""

import jax
import jax.numpy as jnp

from plait.kernels import chunking
from plait.kernels.attention.visits import Layout
from plait.kernels.shapes import accumulation_dtype
from plait.kernels.tokens import Tokens

Array = jax.Array

_ROUNDINGS = 4
"""By how many roundings of |q| |k|, and not of its own size, a logit that is made twice may differ from itself: its terms may cancel. The
products were within one of the exact ones in each of some 100,000 rows of 24 to 576 channels, whichever side the queries were on; units are
changed twice on top."""

_CAP_ROUNDINGS = 2
"""By how many roundings of its own size a capped logit may, besides: of the hyperbolic tangent and of units."""


def ties(scale: float, q: Array, longest: Array) -> Array:
    """[..., H], in the accumulation dtype: logits this close to the largest of their row may be it, made once more.

    Args:
      scale: of the logits.
      q: [..., H, K].
      longest: [..., Hkv], the lengths that `longest_keys` finds.
    """
    lengths = _lengths(q)
    return _ROUNDINGS * jnp.finfo(lengths.dtype).eps * scale * lengths * jnp.repeat(longest, q.shape[-2] // longest.shape[-1], -1)


def under_cap(near: Array, peak: Array, soft_cap: float | None) -> Array:
    """`ties` of logits whose largest, `peak`, is one that was capped: a cap brings them together as it rounds them."""
    if soft_cap is None:
        return near
    share = jnp.clip(peak / soft_cap, -1, 1)
    return near * (1 - share) * (1 + share) + _CAP_ROUNDINGS * jnp.finfo(near.dtype).eps * abs(share) * soft_cap


def longest_keys(layout: Layout, queries: Tokens, keys: Tokens, k: Array) -> Array:
    """[B, T, Hkv], in the accumulation dtype: the largest |k| of each query's segment, under a causal mask of positions up to its own.

    It is no smaller than that of any key the query sees: windows, and blocks that are selected, are not looked at. No gradient passes.

    Args:
      layout: what is known of both sides.
      queries: where they are, int32 [B or 1, T].
      keys: likewise, [B or 1, S].
      k: [B, S, Hkv, K].
    """
    lengths = _lengths(jax.lax.stop_gradient(k))
    if layout.own_keys:
        index, real = chunking.segment_index(keys.segment_ids)
        return _so_far(jnp.where(real[:, :, None], lengths, 0), index, layout.mask.causal)
    num_keys, num_queries = k.shape[1], queries.positions.shape[1]
    ids = jnp.concatenate([keys.segment_ids, queries.segment_ids], axis=1)
    positions = jnp.concatenate([keys.positions, queries.positions], axis=1)
    here = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    ids, _, order = jax.lax.sort((ids, positions, here), dimension=1, num_keys=2)  # a key stands before queries of its position
    lengths = jnp.pad(lengths, ((0, 0), (0, num_queries), (0, 0)))
    found = _so_far(jnp.take_along_axis(lengths, order[:, :, None], axis=1), ids, layout.mask.causal)
    back = jnp.argsort(order, axis=1)[:, num_keys:]
    return jnp.take_along_axis(found, back[:, :, None], axis=1)


def _lengths(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(accumulation_dtype(x))), axis=-1))


def _so_far(lengths: Array, index: Array, causal: bool) -> Array:
    """The largest of lengths [B, S, Hkv] in each segment, whose number is in `index`: up to each token, or of all."""
    found = chunking.segment_max(lengths, index)
    if causal:
        return found
    turned = lambda x: jnp.flip(x, axis=1)
    return turned(chunking.segment_max(turned(found), turned(index)))
