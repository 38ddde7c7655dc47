"""Sums over the tokens that each token sees, which linear attention is made of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from plait.kernels import Tokens, decay
from plait.kernels.shapes import accumulation_dtype


class Sums:
    """Sums over the tokens of a document, up to each token or, without `causal`, over all of them; in float32.

    Each is the `decay` op without a decay, which keeps documents apart, skips padding, and gives the state that decoding goes on from;
    over all tokens it runs forward and backward, and what a token found of itself in both counts once. `after` holds the
    states by name.
    """

    def __init__(self, at: Tokens, *, causal: bool, state: Mapping[str, jax.Array] | None = None):
        """Args: `state` holds the sums of the tokens before, by name."""
        self.at, self.causal, self.state = at, causal, state
        self.after: dict[str, jax.Array] = {}

    def read(self, name: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """`sum_j (q_i . k_j) v_j`, `[B, T, H, V]` of `q`, `k` `[B, T, H, K]` and `v` `[B, T, H, V]`."""
        dtype = accumulation_dtype(q, k, v)
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        g = jnp.zeros(v.shape[:3], jnp.float32)
        before = None if self.state is None else self.state[name]
        o, self.after[name] = decay(q, k, v, g, scale=1.0, initial_state=before, at=self.at)
        if self.causal:
            return o
        flip = functools.partial(jnp.flip, axis=1)
        behind = dataclasses.replace(self.at, ids=None, segment_ids=flip(self.at.segment_ids), positions=None)
        later, _ = decay(flip(q), flip(k), flip(v), g, scale=1.0, at=behind)
        own = jnp.where(self._real, jnp.sum(q * k, axis=-1, keepdims=True) * v, 0)
        return o + flip(later) - own

    def mass(self, name: str, q: jax.Array, k: jax.Array) -> jax.Array:
        """`q_i . sum_j k_j`, `[B, T, H, 1]`."""
        return self.read(name, q, k, jnp.ones((*q.shape[:3], 1), q.dtype))

    def total(self, name: str, x: jax.Array) -> jax.Array:
        """`sum_j x_j`, `[B, T, H, V]`."""
        one = jnp.ones((*x.shape[:3], 1), x.dtype)
        return self.read(name, one, one, x)

    @functools.cached_property
    def count(self) -> jax.Array:
        """How many tokens each sees, `[B, T, 1, 1]`, at least 1."""
        if self.causal:
            return (self.at.positions + 1.0)[:, :, None, None]
        counted = Sums(self.at, causal=False).total("count", jnp.ones((*self.at.segment_ids.shape, 1, 1)))
        return jnp.maximum(counted, 1.0)

    @property
    def _real(self) -> jax.Array:
        return (self.at.segment_ids > 0)[:, :, None, None]


def read_flops(key_dim: int, value_dim: int) -> float:
    """Operations of one token in `Sums.read`: its write, which is no product where one side is a single channel, and its read."""
    return (4.0 if min(key_dim, value_dim) > 1 else 2.0) * key_dim * value_dim
