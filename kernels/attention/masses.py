"""Where attention goes, from a row's log-normaliser: weights on a segment's first tokens, and what each key receives."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.attention.bias import Bias
from plait.kernels.attention.by_head import each_mask
from plait.kernels.attention.call import MassCall
from plait.kernels.attention.chunked import groups
from plait.kernels.attention.per_query import first_mass
from plait.kernels.attention.reference import MASKED as HIDDEN
from plait.kernels.attention.reference import grouped_heads, logits, visible_pairs
from plait.kernels.dispatch import Implementation, Op, kernel
from plait.kernels.masks import HeadMasks, Mask, SelectedBlocks
from plait.kernels.shapes import accumulation_dtype, matmul_precision
from plait.kernels.tokens import Tokens

Array = jax.Array

MAX_TILE = 1 << 22
"""Weights a head that exist at a time in the chunked form."""


@each_mask()
@jax.named_scope("attention_masses")
def first_masses(q: Array, k: Array, lse: Array, *, first_k: int = 4, **options: Any) -> Array:
    """The weights of every query on the first tokens of its segment; `first_k` scores a query, and no pass over the keys.

    Args:
      q: [B, T, H, K].
      k: [B, S, Hkv, K].
      lse: [B, T, H], as `attention` returns it with `return_stats` for the same arguments.
      first_k: how many leading positions, at least 1.
      options: those of `attention` but `sinks`, which is in lse, `return_stats` and `implementation`; `mask` is needed.

    Returns:
      [B, T, H, first_k] float32, 0 where a query does not see the token; for the sigmoid, shares of the row sum. Differentiable.

    Raises:
      ValueError: a shape does not fit, or first_k is below 1.
    """
    if first_k < 1:
        raise ValueError(f"first_masses: first_k={first_k} must be at least 1; use 1 for the first token alone")
    call = MassCall.of("first_masses", q=q, k=k, lse=lse, **options)
    sides = call.sides
    return jnp.stack([first_mass(call, lse, *sides, position=p) for p in range(first_k)], axis=-1)


@each_mask()
@jax.named_scope("attention_masses")
def column_mass(
    q: Array,
    k: Array,
    lse: Array,
    *,
    mask: Mask | HeadMasks,
    at: Tokens | None = None,
    scale: float | None = None,
    logit_soft_cap: float | None = None,
    bias: Bias | None = None,
    selected: SelectedBlocks | None = None,
    implementation: str = "auto",
) -> Array:
    """What each key receives: the sum of its softmax weights over all queries. Half the products of a forward pass, no gradient.

    Args:
      q: [B, T, H, K], float32 or bfloat16.
      k: [B, T, Hkv, K].
      lse: [B, T, H], as `attention` returns it with `return_stats` for the same arguments; sink logits are in it where there are any.
      mask, at, scale, logit_soft_cap, bias, selected: as in `attention`.
      implementation: "auto", "pallas_tpu", "chunked" or "reference".

    Returns:
      [B, T, H] float32: sum_i A_ij of key j. Over the keys of a segment it sums to the segment's queries (less their sinks' shares).

    Raises:
      ValueError: a shape does not fit, or the implementation is unknown.
      NotImplementedError: the named implementation does not support the call.
    """
    q, k, lse, bias = jax.lax.stop_gradient((q, k, lse, bias))
    call = MassCall.of(
        "column_mass",
        q=q,
        k=k,
        lse=lse,
        mask=mask,
        at=at,
        scale=scale,
        logit_soft_cap=logit_soft_cap,
        bias=bias,
        selected=selected,
    )
    return _op(implementation, call)


def _reference(call: MassCall) -> Array:
    """All weights at once."""
    dtype = accumulation_dtype(call.q, call.k)
    mass = _received(call.replace(q=call.q.astype(dtype), k=call.k.astype(dtype)), *call.sides, "highest")
    return jnp.swapaxes(mass.reshape(call.q.shape[0], -1, call.q.shape[1]), 1, 2)


def _received(call: MassCall, queries: Tokens, keys: Tokens, precision: Any) -> Array:
    """What the keys receive from the call's queries, [B, Hkv, R, S]."""
    lse = grouped_heads(jnp.swapaxes(call.lse, 1, 2), call.k.shape[2])[..., None]
    visible = visible_pairs(call, queries, keys) & (lse > HIDDEN / 2)
    z = logits(call, queries, keys, precision)
    return jnp.where(visible, jnp.exp(jnp.where(visible, z - lse, 0)), 0).sum(3)


def _chunked(call: MassCall) -> Array:
    """Some queries at a time, over the keys that the mask may show them."""
    q, k, (queries, keys) = call.q, call.k, call.sides
    length = q.shape[1]
    block = max(1, min(length, MAX_TILE // length))
    padding = -length % block
    near = call.own_keys and not call.mask.num_sink_tokens  # which stand anywhere
    ranges = [call.mask.key_range(i, i + block, length) if near else (0, length) for i in range(0, length, block)]

    def cut(x: Array) -> Array:  # [B, T, ...] to [N, B, block, ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

    def add(total: Array, part: tuple[dict[str, Any], Tokens, Array], *, width: int) -> tuple[Array, None]:
        of_queries, queries, low = part
        seen = lambda x, axis=1: jax.lax.dynamic_slice_in_dim(x, low, width, axis)
        mass = _received(call.replace(k=seen(k), **of_queries), queries, jax.tree.map(seen, keys), matmul_precision(q.dtype))
        return jax.lax.dynamic_update_slice_in_dim(total, seen(total, 3) + mass, low, 3), None

    parts = jax.tree.map(cut, ({name: getattr(call, name) for name in ("q", "lse", "selected")}, queries))
    shape = (q.shape[0], k.shape[2], q.shape[2] // k.shape[2], length)
    total = jnp.zeros(shape, accumulation_dtype(q, k))
    for first, last in groups(ranges):
        width = max(high - low for low, high in ranges[first:last])
        lows = jnp.asarray([min(low, length - width) for low, _ in ranges[first:last]], jnp.int32)
        some = jax.tree.map(lambda x, part=slice(first, last): x[part], parts)
        total, _ = jax.lax.scan(functools.partial(add, width=width), total, (*some, lows))
    return jnp.swapaxes(total.reshape(shape[0], -1, length), 1, 2)


_op = Op(
    "column_mass",
    pallas_tpu=kernel("tpu", "plait.kernels.attention.pallas_tpu", "column_mass", "column_mass_unsupported"),
    chunked=Implementation(_chunked),
    reference=Implementation(_reference),
)
