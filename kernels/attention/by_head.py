"""The ops of attention where heads have masks of their own: one run for the heads of each mask."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels.attention.bias import DistanceBias, LowRankBias
from plait.kernels.masks import HeadGroup, HeadMasks, SelectedBlocks

_HEADS = {"q": 2, "active": 2, "lse": 2, "sinks": -1, "sigmoid_bias": -1}
"""Arguments with an axis of query heads, and which it is; `k` and `v` have one of key heads."""


def each_mask(*, axis: int = 2) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Lets an op with `mask` take `HeadMasks` for it.

    Args:
      axis: where its results have their heads.
    """

    def wrap(op: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(op)

        @functools.wraps(op)
        def run(*args: Any, **options: Any) -> Any:
            masks = options.get("mask")
            if not isinstance(masks, HeadMasks):
                return op(*args, **options)
            given = {**signature.bind_partial(*args).arguments, **options}
            num_heads, num_kv_heads = given["q"].shape[2], given["k"].shape[2]
            if len(masks.masks) != num_heads:
                raise ValueError(
                    f"{op.__name__}: mask has {len(masks.masks)} masks and q has H={num_heads} heads; give one a head"
                )
            if num_heads % num_kv_heads:
                return op(*args, **options | {"mask": masks.masks[0]})  # which says what does not fit
            groups = list(masks.groups(num_kv_heads))
            found = [op(**_of_group(given, group, num_heads // num_kv_heads)) for group in groups]
            order = np.argsort([head for group in groups for head in group.heads])
            return jax.tree.map(lambda *parts: _take(jnp.concatenate(parts, axis=axis), order, axis), *found)

        return run

    return wrap


def _of_group(given: Mapping[str, Any], group: HeadGroup, share: int) -> dict[str, Any]:
    """The arguments for some of the heads."""
    cut: dict[str, Any] = {**given, "mask": group.mask}
    for name, axis in _HEADS.items():
        if getattr(cut.get(name), "ndim", 0):
            cut[name] = _take(cut[name], group.heads, axis)
    for name in ("k", "v"):
        if cut.get(name) is not None:
            cut[name] = _take(cut[name], group.kv_heads, 2)
    bias, selected = cut.get("bias"), cut.get("selected")
    shared = lambda x, heads: x if x.shape[2] == 1 else _take(x, heads, 2)
    if isinstance(bias, LowRankBias):
        cut["bias"] = LowRankBias(shared(bias.q, group.heads), shared(bias.k, group.kv_heads))
    elif isinstance(bias, DistanceBias):
        of = lambda x: None if x is None else _take(x, group.heads, 0)
        cut["bias"] = DistanceBias(of(bias.table), of(bias.slopes), bias.edges)
    if isinstance(selected, SelectedBlocks) and selected.indices.shape[2] > 1:
        each = share * given["k"].shape[2] // selected.indices.shape[2]
        indices = _take(selected.indices, [head // each for head in group.heads], 2)
        cut["selected"] = dataclasses.replace(selected, indices=indices)
    return cut


def _take(x: jax.Array, heads: Sequence[int] | np.ndarray, axis: int) -> jax.Array:
    """Some heads of `x`: all as it is, a run of them as a slice."""
    axis, first = axis % x.ndim, int(heads[0])
    if np.array_equal(heads, np.arange(first, first + len(heads))):
        return x if len(heads) == x.shape[axis] else jax.lax.slice_in_dim(x, first, first + len(heads), axis=axis)
    return jnp.take(x, np.asarray(heads), axis=axis)
