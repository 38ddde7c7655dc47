"""Local linear attention by blocks of queries against all keys, recomputed in the backward pass."""

from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.local_linear.call import LocalLinearCall
from plait.kernels.local_linear.reference import outputs

Array = jax.Array

MAX_TILE = 1 << 20
"""Query-key pairs a head that one block holds at most."""
MAX_BLOCK = 128
"""Queries a block at most: each of them has a matrix of K x K to solve."""


def local_linear(call: LocalLinearCall) -> Array:
    """See `plait.kernels.local_linear`."""
    length, num_keys = call.q.shape[1], call.k.shape[1]
    queries, keys = call.sides
    block = min(MAX_BLOCK, max(8, MAX_TILE // num_keys))
    if length <= block:
        return outputs(call, queries, keys)

    def cut(x: Array) -> Array:
        """[B, T, ...] to [blocks, B, block, ...], filled up with padding, which sees nothing."""
        x = jnp.pad(x, [(0, 0), (0, -length % block)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def run(block: Any) -> Array:
        q, probe, tokens = block
        return outputs(call.replace(q=q, probe=probe), tokens, keys)

    o = jnp.moveaxis(jax.lax.map(run, jax.tree.map(cut, (call.q, call.probe, queries))), 0, 1)
    return o.reshape(o.shape[0], -1, *o.shape[3:])[:, :length]
