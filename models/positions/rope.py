"""Rotary position embedding (arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels.shapes import matmul_precision
from plait.kernels.target import not_on


def frequencies(dim: int, theta: float) -> np.ndarray:
    """The angle by which a position turns each pair of `dim` channels, `[dim / 2]` float64: theta^(-2i / dim)."""
    return float(theta) ** (-np.arange(0, dim, 2) / dim)


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """`x` `[B, T, H, K]` rotated by `positions` `[B, T]` with base `theta`; channel d pairs with d + K/2. Angles in float32."""
    return turn(x, positions, frequencies(x.shape[-1], theta))


def turn(
    x: jax.Array, positions: jax.Array, frequency: np.ndarray | Sequence[float], *, interleaved: bool = False, factor: float = 1.0
) -> jax.Array:
    """`x` `[B, T, H, K]` with its first 2R channels rotated, each pair by its `frequency` `[R]` times the position, and times `factor`.

    Pairs are (d, d + R), as in Llama's checkpoints, or `interleaved` (2d, 2d + 1), as in GPT-J's. Angles in float32.
    """
    half = len(frequency)
    angle = positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(frequency, jnp.float32)[None, None, None]
    cos, sin = factor * jnp.cos(angle), factor * jnp.sin(angle)
    if not_on("tpu") is None:
        return _turn_by_product(x, cos, sin, interleaved)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turned.astype(jnp.float32).reshape(*x.shape[:-1], *((half, 2) if interleaved else (2, half)))
    a, b = (jnp.take(pairs, i, axis=-1 if interleaved else -2) for i in (0, 1))
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1 if interleaved else -2)
    return jnp.concatenate([turned.reshape(*x.shape[:-1], 2 * half).astype(x.dtype), rest], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _turn_by_product(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    """`turn` by `[B, T, 1, R]`, where halves of lanes are dear and products cheap: a product with a permutation, which is exact, brings each
    channel the other of its pair. The gradient turns back."""
    half, width = cos.shape[-1], x.shape[-1]
    first, second = (2 * np.arange(half) + i if interleaved else np.arange(half) + i * half for i in (0, 1))
    swap = np.zeros((width, width), np.float32)
    swap[first, second] = swap[second, first] = 1
    spread = lambda a, b, rest: jnp.concatenate(
        [jnp.stack([a, b], axis=-1 if interleaved else -2).reshape(*a.shape[:-1], 2 * half),
         jnp.full((*a.shape[:-1], width - 2 * half), rest, a.dtype)], axis=-1)  # fmt: skip
    precision = matmul_precision(x.dtype)
    others = jnp.einsum("bthk,kl->bthl", x, swap.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * spread(cos, cos, 1) + others * spread(-sin, sin, 0)).astype(x.dtype)


def _turn_forward(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _turn_by_product(x, cos, sin, interleaved), (cos, sin)


def _turn_backward(interleaved: bool, saved: tuple[jax.Array, ...], d_turned: jax.Array) -> tuple[Any, ...]:
    cos, sin = saved
    return _turn_by_product(d_turned, cos, -sin, interleaved), None, None


_turn_by_product.defvjp(_turn_forward, _turn_backward)
