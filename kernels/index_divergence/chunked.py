"""The divergence for some queries at a time, recomputed in the backward pass: memory grows with T, not with its square."""

import jax
import jax.numpy as jnp

from plait.kernels.index_divergence.call import DivergenceCall
from plait.kernels.index_divergence.reference import divergence
from plait.kernels.shapes import accumulation_dtype, matmul_precision

Array = jax.Array

BLOCK_SIZE = 128
"""Queries a block."""

MAX_TILE = 1 << 21
"""Query-key pairs a head that a block holds at most."""


def index_divergence(call: DivergenceCall) -> Array:
    """See `plait.kernels.index_divergence`."""
    length, num_keys = call.q.shape[1], call.k.shape[1]
    block = min(length, BLOCK_SIZE, max(8, MAX_TILE // num_keys))
    precision = matmul_precision(call.q.dtype)
    call = call.replace(index_k=call.index_k.astype(accumulation_dtype(call.index_k)))  # its gradient is summed over blocks

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -length % block)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

    parts = jax.tree.map(cut, call.of_queries)
    rows = jax.lax.map(jax.checkpoint(lambda part: divergence(call.replace(**part), precision)), parts)
    return jnp.moveaxis(rows, 0, 1).reshape(call.q.shape[0], -1)[:, :length]
