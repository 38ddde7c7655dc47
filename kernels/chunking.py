"""What the chunk-parallel recurrences share: chunks, segment boundaries, decayed products and a stable triangular inverse.

Inside the implementations arrays are head-major, `[B, H, N, C, K]`: N chunks of C tokens, C a power of two. Everything here is
float32 (float64 in float64 tests) at full matmul precision, because a state carries its rounding errors forward.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
SOLVED_AT_ONCE = 16
"""Tokens of the diagonal blocks that `solve_unit_lower` inverts."""
SCANNED_AT_ONCE, SCAN = 4096, 512
"""Tokens of a row that are gone through in one scan, and of a run of a longer one."""
PAIRED = 64
"""Tokens of which `segment_max` compares all pairs."""
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


def running_max(x: Array) -> Array:
    """The largest of the integers x [B, T] so far."""
    return _running(x, jax.lax.cummax, jnp.maximum, jnp.iinfo(x.dtype).min)


def running_sum(x: Array) -> Array:
    """The sum of the integers x [B, T] so far."""
    return _running(x, jax.lax.cumsum, jnp.add, 0)


def _running(x: Array, scan: Callable[..., Array], join: Callable[[Array, Array], Array], nothing: int) -> Array:
    """Long rows go by runs: a TPU's compiler takes a quarter of a minute for one scan of 131,072 tokens."""
    batch, length = x.shape
    if length <= SCANNED_AT_ONCE:
        return scan(x, axis=1)
    runs = jnp.pad(x, ((0, 0), (0, -length % SCAN)), constant_values=nothing).reshape(batch, -1, SCAN)
    inside = scan(runs, axis=2)
    before = _running(inside[:, :-1, -1], scan, join, nothing)
    before = jnp.pad(before, ((0, 0), (1, 0)), constant_values=nothing)
    return join(inside, before[:, :, None]).reshape(batch, -1)[:, :length]


def segment_max(x: Array, index: Array) -> Array:
    """The largest of x [B, T, H], none negative, so far in each segment: neighbours with one number in index [B or 1, T] are of one.

    All pairs of a run are compared, and the ends of runs likewise: a TPU's compiler takes half a minute for an associative scan of 131,072
    tokens.
    """
    length, heads = x.shape[1:]
    size = min(PAIRED, length)
    runs, numbers = (to_chunks(each, size) for each in (x, index))
    seen = jnp.tril(numbers[..., :, None] == numbers[..., None, :])
    inside = jnp.max(jnp.where(seen[..., None], runs[:, :, None], 0), axis=3)
    if runs.shape[1] > 1:
        before = segment_max(inside[:, :-1, -1], numbers[:, :-1, -1])
        before = jnp.where((numbers[:, 1:] == numbers[:, :-1, -1:])[..., None], before[:, :, None], 0)
        inside = jnp.maximum(inside, jnp.pad(before, ((0, 0), (1, 0), (0, 0), (0, 0))))
    return inside.reshape(-1, runs.shape[1] * size, heads)[:, :length]


def segment_index(segment_ids: Array) -> tuple[Array, Array]:
    """The segment number of every token, from 0 and never falling, and which tokens are real (id not 0), both [B, T].

    Padding is skipped: it belongs to the segment before it, and before the first real token to the first segment.
    """
    real = segment_ids != 0
    tokens = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None, :]
    last_real = running_max(jnp.where(real, tokens, 0))
    filled = jnp.take_along_axis(segment_ids, last_real, axis=1)
    starts = (filled[:, 1:] != filled[:, :-1]) & (filled[:, :-1] != 0)
    return jnp.pad(running_sum(starts.astype(jnp.int32)), ((0, 0), (1, 0))), real


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


def _merge(top: Array, left: Array, bottom: Array) -> Array:
    """The lower block matrix [[top, 0], [left, bottom]]."""
    upper = jnp.concatenate([top, jnp.zeros_like(top)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([left, bottom], axis=-1)], axis=-2)


def _halves(x: Array, size: int) -> tuple[Array, Array]:
    """[..., C, X] to the even and the odd runs of `size` rows, both [..., C / (2 size), size, X]."""
    pairs = x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def _join(even: Array, odd: Array) -> Array:
    """The inverse of `_halves`."""
    pairs = jnp.stack([even, odd], axis=-3)
    return pairs.reshape(*pairs.shape[:-4], -1, pairs.shape[-1])


def _double(prefix: Array, suffix: Array, size: int) -> tuple[Array, Array]:
    """Sums within runs of `size` tokens to sums within runs of twice that."""
    (p0, p1), (s0, s1) = _halves(prefix, size), _halves(suffix, size)
    return _join(p0, p1 + p0[..., -1:, :]), _join(s0 + p1[..., -1:, :], s1)


def decay_sums(g: Array) -> tuple[Array, Array]:
    """Sums of g [..., C, K] over the chunk, up to each token, itself included, and after each token; no sum is a difference."""
    up_to = jnp.tril(jnp.ones((g.shape[-2],) * 2, g.dtype))
    return dot("ij,...jk->...ik", up_to, g), dot("ij,...jk->...ik", 1 - up_to, g)


def decay_between(g: Array) -> Array:
    """What is left at token i of what token j wrote, [..., C, C] of g [..., C, 1]: exp(g_{j+1} + ... + g_i) for j <= i, else 0.

    The sums are one matmul with 0/1 weights, so here too none is a difference.
    """
    up_to = jnp.tril(jnp.ones((g.shape[-2],) * 2, g.dtype))
    lift = lambda x: x.reshape(*[1] * (g.ndim - 2), *x.shape)
    return jnp.exp(dot("is,...sj->...ij", up_to, g * lift(jnp.tril(up_to, -1)))) * lift(up_to)


@jax.custom_vjp
def decayed_scores(q: Array, k: Array, g: Array) -> Array:
    """Scores of every query with the keys up to it, decayed in between.

    A_ij = sum_d q_id k_jd exp(g_{j+1,d} + ... + g_id) for j <= i, else 0.

    The chunk is halved: queries of the later half carry the decay since the half's start, keys of the earlier half the decay up
    to it, and their product is one matmul; both halves recurse. No exponent is positive and none is a difference of sums, so
    nothing overflows and strong gates cost no accuracy; the backward pass keeps both properties.

    Args:
      q: [..., C, K].
      k: [..., C, K].
      g: [..., C, K] log decay, at most 0.

    Returns:
      [..., C, C], zero above the diagonal.
    """
    scores, prefix, suffix, size = jnp.sum(q * k, axis=-1)[..., None, None], g, jnp.zeros_like(g), 1  # scores [..., C, 1, 1]
    while size < k.shape[-2]:
        late = _halves(q, size)[1] * jnp.exp(_halves(prefix, size)[1])
        early = _halves(k, size)[0] * jnp.exp(_halves(suffix, size)[0])
        blocks = scores.reshape(*scores.shape[:-3], -1, 2, size, size)
        scores = _merge(blocks[..., 0, :, :], dot("...ik,...jk->...ij", late, early), blocks[..., 1, :, :])
        prefix, suffix = _double(prefix, suffix, size)
        size *= 2
    return scores[..., 0, :, :]


def _decayed_scores_forward(q: Array, k: Array, g: Array) -> tuple[Array, tuple[Array, ...]]:
    return decayed_scores(q, k, g), (q, k, g)


def _decayed_scores_backward(residuals: tuple[Array, ...], dscores: Array) -> tuple[Array, ...]:
    q, k, g = residuals
    sums, size = [(g, jnp.zeros_like(g))], 1
    while 2 * size < g.shape[-2]:
        sums.append(_double(*sums[-1], size))
        size *= 2
    diagonal = jnp.diagonal(dscores, axis1=-2, axis2=-1)[..., None]
    dq, dk, dprefix, dsuffix = diagonal * k, diagonal * q, jnp.zeros_like(g), jnp.zeros_like(g)
    dblocks = dscores[..., None, :, :]  # [..., blocks, 2 size, 2 size]
    for level in reversed(range((g.shape[-2] - 1).bit_length())):
        size = 1 << level
        since, to = jnp.exp(_halves(sums[level][0], size)[1]), jnp.exp(_halves(sums[level][1], size)[0])
        late, early = _halves(q, size)[1] * since, _halves(k, size)[0] * to
        dleft = dblocks[..., size:, :size]
        dlate, dearly = dot("...ij,...jk->...ik", dleft, early), dot("...ij,...ik->...jk", dleft, late)
        dq += _join(jnp.zeros_like(dlate), dlate * since)
        dk += _join(dearly * to, jnp.zeros_like(dearly))
        (p0, p1), (s0, s1) = _halves(dprefix, size), _halves(dsuffix, size)
        last = (jnp.arange(size) == size - 1).astype(g.dtype).reshape(*[1] * (p0.ndim - 2), size, 1)
        p0, p1 = p0 + last * jnp.sum(p1, axis=-2, keepdims=True), p1 + last * jnp.sum(s0, axis=-2, keepdims=True)
        dprefix, dsuffix = _join(p0, p1 + dlate * late), _join(s0 + dearly * early, s1)
        dblocks = jnp.stack([dblocks[..., :size, :size], dblocks[..., size:, size:]], axis=-3)
        dblocks = dblocks.reshape(*dblocks.shape[:-4], -1, size, size)
    return dq, dk, dprefix


decayed_scores.defvjp(_decayed_scores_forward, _decayed_scores_backward)


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


def solve_unit_lower(lower: Array, right: Array) -> Array:
    """(I + L)^-1 `right` [..., C, X] for strictly lower triangular L [..., C, C], block after block.

    The errors of a whole inverse would add up where its entries nearly cancel each other, as on equal keys with a beta of 2.
    """
    half = lower.shape[-1] // 2
    if half < SOLVED_AT_ONCE:
        return dot("...ij,...jx->...ix", unit_lower_inverse(lower), right)
    top = solve_unit_lower(lower[..., :half, :half], right[..., :half, :])
    rest = right[..., half:, :] - dot("...ij,...jx->...ix", lower[..., half:, :half], top)
    return jnp.concatenate([top, solve_unit_lower(lower[..., half:, half:], rest)], axis=-2)
