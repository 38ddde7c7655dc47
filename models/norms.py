"""Normalisations, computed in float32 whatever the input dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from plait.models.build import BuildContext


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis (arXiv 1910.07467), or over each of its equal groups."""

    def __init__(self, ctx: BuildContext, dim: int, *, eps: float, axis: str | None = None, groups: int = 1):
        """Args: `dim` is the last axis' width, `axis` its logical name (None: replicated)."""
        self.eps, self.groups = eps, groups
        self.scale = ctx.param(jax.nn.initializers.ones, (dim,), (axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        grouped = x32.reshape(*x.shape[:-1], self.groups, -1) if self.groups > 1 else x32
        grouped = grouped * jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=-1, keepdims=True) + self.eps)
        x32 = grouped.reshape(x.shape)
        scale = self.scale[...].astype(jnp.float32)
        return (x32 * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`(x - mean(x)) / std(x) * scale + bias` over the last axis (arXiv 1607.06450)."""

    def __init__(self, ctx: BuildContext, dim: int, *, eps: float, axis: str | None = None):
        """Args: `dim` is the last axis' width, `axis` its logical name (None: replicated)."""
        self.eps = eps
        self.scale = ctx.param(jax.nn.initializers.ones, (dim,), (axis,))
        self.bias = ctx.param(jax.nn.initializers.zeros, (dim,), (axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        scale, bias = (p[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + p.shape) for p in (self.scale, self.bias))
        return (x32 * scale + bias).astype(x.dtype)


def l2_normalize(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """`x / sqrt(sum(x^2) + eps)` over the last axis: the key and query normalisation of the delta-rule family."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True) + eps)).astype(x.dtype)
