"""The scan by chunks: associative inside a chunk, from chunk to chunk in order. The backward pass is the same scan from the other end."""

import functools

import jax
import jax.numpy as jnp

from plait.kernels import chunking
from plait.kernels.linear_scan import reference
from plait.kernels.linear_scan.call import LinearScanCall, real_and_starts
from plait.kernels.shapes import accumulation_dtype

Array = jax.Array


def linear_scan(call: LinearScanCall) -> tuple[Array, Array]:
    """See `plait.kernels.linear_scan`."""
    if call.x.shape[1] == 1:
        return reference.linear_scan(call)
    x, g = (y.astype(accumulation_dtype(call.x)) for y in (call.x, call.g))
    real, starts = real_and_starts(call.segment_ids)
    if real is not None and starts is not None:
        x, g = (jnp.where(real[..., None], y, 0) for y in (x, g))
    decay = jnp.exp(g)
    decay = decay if starts is None else jnp.where(starts[..., None], 0, decay)
    h = scan(decay, x, call.start, call.chunk_size)
    final = h[:, -1]
    h = h if real is None else jnp.where(real[..., None], h, 0)
    return h.astype(call.x.dtype), final


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def scan(decay: Array, x: Array, start: Array, chunk_size: int) -> Array:
    """The states `h_t = decay_t h_{t-1} + x_t` of `decay` and `x` [B, T, ...] from `start` [B, ...], all of one dtype.

    Keeps `decay` and `h` for the backward pass, nothing by chunk and level: with `d` the cotangent of `h`,

        dx_t = d_t + decay_{t+1} dx_{t+1},    ddecay_t = dx_t h_{t-1},    dstart = decay_1 dx_1.
    """
    chunk_size = chunking.fit_chunk_size(chunk_size, x.shape[1])
    decay, h = jax.lax.associative_scan(
        _after, (chunking.to_chunks(decay, chunk_size), chunking.to_chunks(x, chunk_size)), axis=2
    )

    def advance(state: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        through, written = chunk
        return through * state + written, state

    _, entering = jax.lax.scan(advance, start, (jnp.moveaxis(decay[:, :, -1], 1, 0), jnp.moveaxis(h[:, :, -1], 1, 0)))
    h = h + decay * jnp.moveaxis(entering, 0, 1)[:, :, None]
    return h.reshape(h.shape[0], -1, *h.shape[3:])[:, : x.shape[1]]


def _after(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    return first[0] * second[0], second[0] * first[1] + second[1]


def _scan_forward(decay: Array, x: Array, start: Array, chunk_size: int) -> tuple[Array, tuple[Array, ...]]:
    h = scan(decay, x, start, chunk_size)
    return h, (decay, h, start)


def _scan_backward(chunk_size: int, residuals: tuple[Array, ...], dh: Array) -> tuple[Array, ...]:
    decay, h, start = residuals
    following = jnp.concatenate([decay[:, 1:], jnp.zeros_like(decay[:, :1])], axis=1)
    dx = jnp.flip(scan(jnp.flip(following, 1), jnp.flip(dh, 1), jnp.zeros_like(start), chunk_size), 1)
    before = jnp.concatenate([start[:, None], h[:, :-1]], axis=1)
    return dx * before, dx, decay[:, 0] * dx[:, 0]


scan.defvjp(_scan_forward, _scan_backward)
