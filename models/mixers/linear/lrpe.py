"""Relative positions that a linear recurrence can carry: each channel turns, and keeps its own decay."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from plait.models.axes import HEADS
from plait.models.build import BuildContext


class Lrpe(nnx.Module):
    """`[x cos(theta t), x sin(theta t)]` at position t, so that `q_i . k_j` weighs channel c by `cos(theta_c (i - j))`.

    Twice the channels come out. The angle of each channel of each head is learned and starts at `base^(-2 c / D)`, c counting the D
    channels of all heads.

    Source: Linearized Relative Positional Encoding, arXiv 2307.09270, in the form that TransNormerLLM (2307.14995) takes.
    """

    def __init__(self, ctx: BuildContext, num_heads: int, head_dim: int, *, base: float = 1e4):
        channels = jnp.arange(num_heads * head_dim, dtype=jnp.float32).reshape(num_heads, head_dim)
        self.theta = ctx.param(
            lambda key, shape, dtype: (base ** (-2.0 * channels / channels.size)).astype(dtype), channels.shape, (HEADS, None)
        )

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """`x [B, T, H, K]` at `positions [B, T]` to `[B, T, H, 2 K]`; angles in float32."""
        angle = positions.astype(jnp.float32)[:, :, None, None] * self.theta[...].astype(jnp.float32)[None, None]
        turned = [x.astype(jnp.float32) * part for part in (jnp.cos(angle), jnp.sin(angle))]
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)
