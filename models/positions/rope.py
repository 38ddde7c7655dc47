"""Rotary position embedding (arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


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
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    angle = positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(frequency, jnp.float32)[None, None, None]
    cos, sin = factor * jnp.cos(angle), factor * jnp.sin(angle)
    pairs = turned.astype(jnp.float32).reshape(*x.shape[:-1], *((half, 2) if interleaved else (2, half)))
    a, b = (jnp.take(pairs, i, axis=-1 if interleaved else -2) for i in (0, 1))
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1 if interleaved else -2)
    return jnp.concatenate([turned.reshape(*x.shape[:-1], 2 * half).astype(x.dtype), rest], axis=-1)
