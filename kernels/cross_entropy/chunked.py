"""Cross entropy with one chunk of logits at a time, made again in the backward pass when there are several."""

from functools import partial

import jax
import jax.numpy as jnp

from plait.kernels.cross_entropy.call import CrossEntropyCall
from plait.kernels.shapes import accumulation_dtype, matmul_precision

Array = jax.Array

MAX_LOGITS = 1 << 25
"""Logits that the default chunk holds at most (128 MiB of float32)."""


def cross_entropy(call: CrossEntropyCall) -> tuple[Array, Array]:
    """See `plait.kernels.cross_entropy`."""
    hidden, weight, loss_mask, soft_cap, chunk_size = (
        call.hidden,
        call.weight,
        call.loss_mask,
        call.logit_soft_cap,
        call.chunk_size,
    )
    targets = jnp.where(loss_mask, call.targets, 0)
    batch, length, _ = hidden.shape
    if chunk_size is None:
        chunk_size = max(64, MAX_LOGITS // (batch * weight.shape[1]))
    num_chunks = -(-length // chunk_size)
    if num_chunks == 1:  # what fits at once is kept for the backward pass
        return _one_chunk(hidden, weight, targets, loss_mask, soft_cap)
    chunk_size = -(-length // num_chunks)
    padding = num_chunks * chunk_size - length

    def chunks(x: Array) -> Array:  # [B, T, ...] to [N, B, C, ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, num_chunks, chunk_size, *x.shape[2:]), 1, 0)

    nll, lse = _chunked(chunks(hidden), weight, chunks(targets), chunks(loss_mask), soft_cap)
    whole = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length]
    return whole(nll), whole(lse)


def _logits(hidden: Array, weight: Array, soft_cap: float | None) -> Array:
    dtype = accumulation_dtype(hidden, weight)
    logits = jnp.einsum("bcd,dv->bcv", hidden, weight, precision=matmul_precision(hidden.dtype), preferred_element_type=dtype)
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _one_chunk(hidden: Array, weight: Array, targets: Array, mask: Array, soft_cap: float | None) -> tuple[Array, Array]:
    """nll and lse [B, C] of hidden [B, C, D]."""
    logits = _logits(hidden, weight, soft_cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(mask, lse - target, 0), jnp.where(mask, lse, 0)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(hidden: Array, weight: Array, targets: Array, mask: Array, soft_cap: float | None) -> tuple[Array, Array]:
    """nll and lse [N, B, C] of hidden [N, B, C, D]."""
    return jax.lax.map(lambda x: _one_chunk(x[0], weight, x[1], x[2], soft_cap), (hidden, targets, mask))


def _forward(hidden: Array, weight: Array, targets: Array, mask: Array, soft_cap: float | None):
    nll, lse = _chunked(hidden, weight, targets, mask, soft_cap)
    return (nll, lse), (hidden, weight, targets, mask, lse)


def _backward(soft_cap: float | None, residuals: tuple[Array, ...], cotangents: tuple[Array, Array]):
    hidden, weight, targets, mask, lse = residuals
    dtype = accumulation_dtype(hidden, weight)
    precision = matmul_precision(hidden.dtype)
    dot = partial(jnp.einsum, precision=precision, preferred_element_type=dtype)

    def chunk(dweight: Array, x: tuple[Array, ...]) -> tuple[Array, Array]:
        hidden, targets, mask, lse, dnll, dlse = x
        dnll, dlse = jnp.where(mask, dnll, 0), jnp.where(mask, dlse, 0)
        logits = _logits(hidden, weight, soft_cap)
        is_target = targets[..., None] == jnp.arange(logits.shape[-1])[None, None, :]
        dlogits = jnp.exp(logits - jnp.where(mask, lse, jnp.inf)[..., None]) * (dnll + dlse)[..., None]
        dlogits -= jnp.where(is_target, dnll[..., None], 0)
        if soft_cap is not None:
            dlogits *= 1 - jnp.square(logits / soft_cap)
        dlogits = dlogits.astype(hidden.dtype)
        return dweight + dot("bcd,bcv->dv", hidden, dlogits), dot("bcv,dv->bcd", dlogits, weight).astype(hidden.dtype)

    dweight, dhidden = jax.lax.scan(chunk, jnp.zeros(weight.shape, dtype), (hidden, targets, mask, lse, *cotangents))
    return dhidden, dweight.astype(weight.dtype), None, None


_chunked.defvjp(_forward, _backward)
