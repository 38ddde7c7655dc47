"""Attention by a rule, by blocks of queries against the keys they can see, recomputed in the backward pass."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels.shapes import accumulation_dtype, matmul_precision
from plait.kernels.weighted_attention.call import WeightedCall
from plait.kernels.weighted_attention.reference import weighed

Array = jax.Array

DENSE_TILE = 512 * 512
"""Up to so many numbers a head, all rows are one block, kept for the backward pass."""

BLOCK_SIZE = 128
"""Queries a block."""

MAX_TILE = 1 << 21
"""Numbers a head that a block holds at most."""

MAX_GROUPS = 4
"""Groups of blocks that are compiled apart, so that early causal queries skip late keys; with 4, 5/8 of the square remain."""


def weighted_attention(call: WeightedCall) -> Array:
    """See `plait.kernels.weighted_attention`."""
    dtype, precision = accumulation_dtype(call.q, call.k), matmul_precision(call.q.dtype)
    length, num_keys, width = call.length, call.k.shape[1], call.rule.width
    if length == 1 or length * num_keys * width <= DENSE_TILE:
        return weighed(call, precision).astype(call.q.dtype)

    block = min(BLOCK_SIZE, max(8, MAX_TILE // (num_keys * width)))
    count = -(-length // block)
    padded = call.on_queries(lambda x: jnp.pad(x, [(0, 0), (0, -length % block)] + [(0, 0)] * (x.ndim - 2)))
    rows = np.arange(count)[:, None] * block + np.arange(call.rule.halo + block)[None, :]  # [N, halo + block]
    blocks = padded.on_queries(lambda x: jnp.moveaxis(x[:, rows], 1, 0))
    wide = call.replace(k=call.k.astype(dtype), v=call.v.astype(dtype))  # gradients are summed over blocks in this dtype

    @partial(jax.checkpoint, static_argnums=(2,))
    def run_block(block: tuple, call: WeightedCall, reach: int) -> Array:
        q, queries = block
        return weighed(call.on_keys(lambda x: x[:, :reach]).replace(q=q, queries=queries), precision).astype(q.dtype)

    outputs = []
    for first, last in _groups(count if call.own_keys and call.mask.causal else 1, count):
        reach = min(num_keys, last * block) if call.own_keys and call.mask.causal else num_keys
        some = jax.tree.map(lambda x, part=slice(first, last): x[part], (blocks.q, blocks.queries))
        outputs.append(jax.lax.map(lambda x, reach=reach: run_block(x, wide, reach), some))
    whole = jnp.moveaxis(jnp.concatenate(outputs), 0, 1)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])[:, :length]


def _groups(distinct: int, count: int) -> list[tuple[int, int]]:
    """Cuts `count` blocks into runs [first, last), at most as many as there are distinct reaches."""
    return list(pairwise(np.linspace(0, count, min(MAX_GROUPS, distinct) + 1).astype(int).tolist()))
