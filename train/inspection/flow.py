"""What the last token of a text is made of, if each layer mixes tokens as its attention says: rollout and flow, on the host."""

from __future__ import annotations

import functools

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from plait.train.probes.rollout import with_residual

_UNIT = 1 << 30
"""A capacity of 1, in whole numbers, of which the algorithm is."""


def mixing(maps: np.ndarray) -> np.ndarray:
    """`[L, T, T]` float64 of attention `[L, H, T, T]`, shares with NaN for heads that have none: means over heads, with the residual; of the
    layers before the first without attention."""
    known = np.isfinite(maps).all((-1, -2))
    depth = next((layer for layer, heads in enumerate(known) if not heads.any()), len(maps))
    means = [own[heads].mean(0) for own, heads in zip(maps[:depth], known[:depth], strict=True)]
    return np.asarray([with_residual(mean) for mean in means], np.float64).reshape(depth, *maps.shape[-2:])


def rollout(mixed: np.ndarray) -> np.ndarray:
    """`[T]`: shares of the first tokens in the last one, by rollout: layers as products."""
    return functools.reduce(lambda row, layer: row @ layer, mixed[::-1], np.eye(mixed.shape[-1])[-1])


def flow(mixed: np.ndarray) -> np.ndarray:
    """`[T]`: shares of the first tokens in the last one, by flow: how much of each could reach it at most, were the weights capacities of
    pipes from layer to layer, over the sum of these.

    Source: Quantifying Attention Flow in Transformers (2005.00928), section 3.
    """
    depth, size = mixed.shape[:2]
    layer, to, come = np.nonzero(mixed)
    capacity = np.round(mixed[layer, to, come] * _UNIT).astype(np.int32)
    nodes = (depth + 1) * size
    pipes = csr_array((capacity, (layer * size + come, (layer + 1) * size + to)), shape=(nodes, nodes))
    flows = np.asarray([maximum_flow(pipes, token, nodes - 1).flow_value for token in range(size)], np.float64)
    return flows / flows.sum()
