"""What the chunk-parallel recurrences share: chunks, segment boundaries, decayed products and a stable triangular inverse.

Inside the implementations arrays are head-major, `[B, H, N, C, K]`: N chunks of C tokens, C a power of two. Everything here is float32
(float64 in float64 tests) at full matmul precision, because a state carries its rounding errors forward.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
HIGHEST = jax.lax.Precision.HIGHEST


def dot(subscripts: str, *operands: Array) -> Array:
    """`jnp.einsum` at full precision."""
    return jnp.einsum(subscripts, *operands, precision=HIGHEST)


def fit_chunk_size(chunk_size: int, length: int) -> int:
    """The chunk size to use for `length` tokens: not larger than the next power of two."""
    return min(chunk_size, 1 << max(length - 1, 0).bit_length())


def to_chunks(x: Array, chunk_size: int) -> Array:
    """[B, T, ...] to [B, N, C, ...], the last chunk filled up with zeros."""
    batch, length, *rest = x.shape
    padding = -length % chunk_size
    if padding:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * len(rest))
    return x.reshape(batch, -1, chunk_size, *rest)


def heads_to_chunks(x: Array, chunk_size: int, num_heads: int | None = None) -> Array:
    """[B, T, H, ...] to [B, H, N, C, ...]; heads are repeated in contiguous groups up to `num_heads`."""
    if num_heads is not None and num_heads != x.shape[2]:
        x = jnp.repeat(x, num_heads // x.shape[2], axis=2)
    return jnp.moveaxis(to_chunks(x, chunk_size), 3, 1)


def heads_from_chunks(x: Array, length: int) -> Array:
    """[B, H, N, C, ...] to [B, T, H, ...], dropping the filling."""
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def segment_index(segment_ids: Array) -> tuple[Array, Array]:
    """The segment number of every token, from 0 and never falling, and which tokens are real (id not 0), both [B, T].

    Padding is skipped: it belongs to the segment before it, and before the first real token to the first segment.
    """
    real = segment_ids != 0
    tokens = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None, :]
    last_real = jax.lax.cummax(jnp.where(real, tokens, 0), axis=1)
    filled = jnp.take_along_axis(segment_ids, last_real, axis=1)
    starts = (filled[:, 1:] != filled[:, :-1]) & (filled[:, :-1] != 0)
    return jnp.pad(jnp.cumsum(starts.astype(jnp.int32), axis=1), ((0, 0), (1, 0))), real


class Boundaries(NamedTuple):
    """Who sees whom across segment boundaries, as 0/1 factors in the accumulation dtype. One set serves all heads (axis 1)."""

    pairs: Array
    """[B, 1, N, C, C]: tokens i and j are in the same segment."""
    head: Array
    """[B, 1, N, C]: the token still belongs to the segment of the state that enters the chunk."""
    tail: Array
    """[B, 1, N, C]: the token belongs to the segment of the state that leaves the chunk."""
    through: Array
    """[B, 1, N]: the entering state survives the chunk."""


def boundaries(index: Array, chunk_size: int, dtype: jnp.dtype) -> Boundaries:
    """The boundary factors of segment numbers [B, T] as `segment_index` gives them."""
    length = index.shape[1]
    index = jnp.pad(index, ((0, 0), (0, -length % chunk_size)), mode="edge").reshape(index.shape[0], 1, -1, chunk_size)
    last = index[..., -1]
    entering = jnp.pad(last[..., :-1], ((0, 0), (0, 0), (1, 0)))
    pairs = index[..., :, None] == index[..., None, :]
    head, tail = index == entering[..., None], index == last[..., None]
    return Boundaries(*(x.astype(dtype) for x in (pairs, head, tail, last == entering)))


def prefix_sums(g: Array) -> Array:
    """Sums of g [..., C, K] up to and including each token."""
    return jnp.cumsum(g, axis=-2)


def suffix_sums(g: Array) -> Array:
    """Sums of g [..., C, K] after each token, itself excluded; never a difference of larger sums."""
    shifted = jnp.concatenate([g[..., 1:, :], jnp.zeros_like(g[..., :1, :])], axis=-2)
    return jnp.flip(jnp.cumsum(jnp.flip(shifted, -2), axis=-2), -2)


def _merge(top: Array, left: Array, bottom: Array) -> Array:
    """The lower block matrix [[top, 0], [left, bottom]]."""
    upper = jnp.concatenate([top, jnp.zeros_like(top)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([left, bottom], axis=-1)], axis=-2)


def decayed_scores(q: Array, k: Array, g: Array) -> Array:
    """Scores of every query with the keys up to it, decayed in between: sum_d q_id k_jd exp(g_{j+1,d} + ... + g_id) for j <= i, else 0.

    The chunk is halved: queries of the later half carry the decay since the half's start, keys of the earlier half the decay up to
    it, and their product is one matmul; both halves recurse. No exponent is positive and none is a difference of sums, so nothing
    overflows and strong gates cost no accuracy.

    Args:
      q: [P, ..., C, K], P kinds of query.
      k: [..., C, K].
      g: [..., C, K] log decay, at most 0.

    Returns:
      [P, ..., C, C], zero above the diagonal.
    """
    chunk = k.shape[-2]
    scores = jnp.sum(q * k[None], axis=-1)[..., None, None]  # [P, ..., C, 1, 1]
    size = 1
    blocks = lambda x, size: x.reshape(*x.shape[:-2], chunk // (2 * size), 2, size, x.shape[-1])  # noqa: E731
    while size < chunk:
        qs, ks, gs = blocks(q, size), blocks(k, size), blocks(g, size)
        late = qs[..., 1, :, :] * jnp.exp(prefix_sums(gs[..., 1, :, :]))[None]
        early = ks[..., 0, :, :] * jnp.exp(suffix_sums(gs[..., 0, :, :]))
        left = dot("p...ik,...jk->p...ij", late, early)
        pairs = scores.reshape(*scores.shape[:-3], -1, 2, size, size)
        scores = _merge(pairs[..., 0, :, :], left, pairs[..., 1, :, :])
        size *= 2
    return scores[..., 0, :, :]


@jax.custom_jvp
def unit_lower_inverse(lower: Array) -> Array:
    """The inverse of I + L for strictly lower triangular L [..., C, C], by halving: matmuls only, as stable as substitution."""
    chunk = lower.shape[-1]
    inverse = jnp.ones((*lower.shape[:-2], chunk, 1, 1), lower.dtype)
    size = 1
    while size < chunk:
        count = chunk // (2 * size)
        tiles = lower.reshape(*lower.shape[:-2], count, 2, size, count, 2, size)
        left = jnp.moveaxis(jnp.diagonal(tiles[..., 1, :, :, 0, :], axis1=-4, axis2=-2), -1, -3)
        pairs = inverse.reshape(*inverse.shape[:-3], count, 2, size, size)
        top, bottom = pairs[..., 0, :, :], pairs[..., 1, :, :]
        inverse = _merge(top, -dot("...ij,...jk,...kl->...il", bottom, left, top), bottom)
        size *= 2
    return inverse[..., 0, :, :]


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (lower,), (dlower,) = primals, tangents
    inverse = unit_lower_inverse(lower)
    return inverse, -dot("...ij,...jk,...kl->...il", inverse, jnp.tril(dlower, -1), inverse)
