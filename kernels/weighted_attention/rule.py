"""What tells one kind of attention from another here: how the weights of a row follow from its query and the keys."""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels.shapes import accumulation_dtype
from plait.kernels.tokens import Tokens

Array = jax.Array

HIDDEN = -1e30
"""Stands for minus infinity in logits, so that no difference of two of them is NaN."""


class Seen(NamedTuple):
    """What is known of a block of queries, the halo before them included, and of the keys."""

    visible: Array
    """bool [B, 1, halo + R, S]: which keys each query sees."""
    queries: Tokens
    """[B, halo + R], filled in."""
    keys: Tokens
    """[B, S], filled in."""
    precision: Any
    """Of the products."""

    def num_keys(self) -> Array:
        """How many keys each query sees, float32 [B, 1, halo + R, 1]."""
        return jnp.sum(self.visible, axis=-1, keepdims=True).astype(jnp.float32)


class Rule(abc.ABC):
    """Weights of queries on keys. Subclasses are frozen dataclasses of options: hashable, known when a program is traced."""

    @property
    def halo(self) -> int:
        """Queries before its own that a row needs."""
        return 0

    @property
    def width(self) -> int:
        """Numbers that exist at once for a pair and a head."""
        return 1

    @abc.abstractmethod
    def __call__(self, q: Array, k: Array, parameters: Any, seen: Seen) -> Array:
        """The weights [B, H, R, S] in the accumulation dtype, zero at keys that are not visible; gradients finite everywhere.

        Args:
          q: [B, halo + R, H, ...], rows before the first token being padding.
          k: [B, S, Hkv, ...].
          parameters: arrays of the layer's own, in any pytree.
        """


def dot_products(q: Array, k: Array, seen: Seen) -> Array:
    """`q_i . k_j` of q [B, R, H, K] and k [B, S, Hkv, K], whose heads are repeated in groups: [B, H, R, S]."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    z = jnp.einsum("brgnk,bsgk->bgnrs", grouped, k, precision=seen.precision, preferred_element_type=accumulation_dtype(q, k))
    return z.reshape(z.shape[0], -1, *z.shape[3:])


def softmax(z: Array, visible: Array) -> Array:
    """Softmax of z [B, H, R, S] over the visible keys; zeros in a row that sees none."""
    z = jnp.where(visible, z, HIDDEN)
    p = jnp.where(visible, jnp.exp(z - jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))), 0)
    return over_sum(p)


def over_sum(p: Array) -> Array:
    """p >= 0 over the sums of its rows; rows of zeros stay."""
    total = jnp.sum(p, axis=-1, keepdims=True)
    return p / jnp.where(total > 0, total, 1)
