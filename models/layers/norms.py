"""Normalisations, computed in float32 whatever the input dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from plait.models.build import BuildContext, Initializer


class RMSNorm(nnx.Module):
    """`x / rms(x) * (offset + scale)` over the last axis (arXiv 1910.07467), or over each of its equal groups; SRMSNorm (2307.14995) has
    no scale."""

    def __init__(
        self,
        ctx: BuildContext,
        dim: int,
        *,
        eps: float,
        axis: str | None = None,
        groups: int = 1,
        with_scale: bool = True,
        offset: float = 0.0,
    ):
        """Args: `dim` is the last axis' width, `axis` its logical name (None: replicated); with an offset of 1 the scale begins at 0."""
        self.eps, self.groups, self.offset = eps, groups, offset
        self.scale = ctx.param(jax.nn.initializers.constant(1 - offset), (dim,), (axis,)) if with_scale else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        grouped = x32.reshape(*x.shape[:-1], self.groups, -1) if self.groups > 1 else x32
        grouped = grouped * jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=-1, keepdims=True) + self.eps)
        x32 = grouped.reshape(x.shape)
        if self.scale is None:
            return x32.astype(x.dtype)
        scale = self.scale[...].astype(jnp.float32)
        if self.offset:
            scale = self.offset + scale
        return (x32 * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


class GroupNorm(nnx.Module):
    """`(x - mean(x)) / std(x) * scale + bias`, mean and deviation over each of equal groups of the last axis (arXiv 1803.08494)."""

    def __init__(
        self, ctx: BuildContext, dim: int, *, groups: int, eps: float, axis: str | None = None, start: Initializer | None = None
    ):
        """Args: `dim` is the last axis' width, `axis` its logical name (None: replicated), `start` of the scale, 1 by default."""
        self.eps, self.groups = eps, groups
        self.scale = ctx.param(start or jax.nn.initializers.ones, (dim,), (axis,))
        self.bias = ctx.param(jax.nn.initializers.zeros, (dim,), (axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, -1)
        grouped = grouped - jnp.mean(grouped, axis=-1, keepdims=True)
        grouped = grouped * jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=-1, keepdims=True) + self.eps)
        scale, bias = (p[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + p.shape) for p in (self.scale, self.bias))
        return (grouped.reshape(x.shape) * scale + bias).astype(x.dtype)


AnyNorm = RMSNorm | GroupNorm


def make_norm(ctx: BuildContext, dim: int, *, eps: float, axis: str | None = None) -> AnyNorm:
    """A norm of the model's kind over the last axis, of `dim` channels with the logical name `axis` (None: replicated)."""
    if ctx.norm_kind == "layer":
        return GroupNorm(ctx, dim, groups=1, eps=eps, axis=axis)
    return RMSNorm(ctx, dim, eps=eps, axis=axis, offset=1.0 if ctx.norm_kind == "rms_1p" else 0.0)
