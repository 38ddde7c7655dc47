"""ComplexFormer's attention: queries and keys as complex numbers, whose angles a head adapts before positions turn them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from plait.models.axes import HEADS, KV_HEADS
from plait.models.build import BuildContext
from plait.models.mixers.base import register
from plait.models.mixers.full.by_rule import MultiHead
from plait.models.mixers.full.dot_product import GroupedConfig


@register(
    "complexformer",
    kind="full",
    source="ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex Vector Attention (2505.10222)",
    proof="softmax attention at its start, and the formula in float64",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ComplexFormerConfig(GroupedConfig):
    """`z_mn = sum_c |q_c| |k_c| cos(Adapt_c(phi(q_c) - phi(k_c)) + (m - n) theta_c) / sqrt(K)`, `A = softmax(z)`: channels c and c + K/2 of
    query m and key n are the real and imaginary part of q_c and k_c, with angles phi, and `theta_c` the rotary embedding's
    (or another position encoding).

    The abstract has the rotation `exp[i (Adapt(angle difference) + position difference)]`, another a head; it does not say what Adapt is,
    and the paper is withdrawn. Here `Adapt_c(d) = a_c d + b_c`, learned for each head and channel from a = 1 and b = 0 on, which is
    softmax attention with the rotary embedding. Of the difference of two angles it makes a difference of two terms, so that scores
    stay dot products, of `q'_c = q_c exp(i ((a_c - 1) phi(q_c) + b_c + m theta_c))` and k' alike without b. Heads that share keys
    share a.
    """

    @classmethod
    def example(cls) -> ComplexFormerConfig:
        return cls(num_heads=4, head_dim=16)

    def check(self) -> None:
        super().check()
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even, two channels being a complex number; use {self.head_dim + 1}"
            )

    def build(self, d_model: int, ctx: BuildContext) -> ComplexFormer:
        return ComplexFormer(self, d_model, ctx)


class ComplexFormer(MultiHead):
    """See `ComplexFormerConfig`."""

    def __init__(self, config: ComplexFormerConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        pairs = config.head_dim // 2
        self.slope = ctx.param(jax.nn.initializers.ones, (self.num_kv_heads, pairs), (KV_HEADS, None))
        self.offset = ctx.param(jax.nn.initializers.zeros, (self.num_heads, pairs), (HEADS, None))

    def prepared(self, q, k, *, at):
        slope, offset = self.slope[...].astype(jnp.float32), self.offset[...].astype(jnp.float32)
        group = self.num_heads // self.num_kv_heads
        return super().prepared(adapted(q, jnp.repeat(slope, group, axis=0), offset), adapted(k, slope, 0 * slope), at=at)


def adapted(y: jax.Array, slope: jax.Array, offset: jax.Array) -> jax.Array:
    """`y` `[B, T, H, K]` with the angle phi of each pair of channels turned to `slope phi + offset`, both `[H, K / 2]`."""
    real, imaginary = jnp.split(y.astype(jnp.float32), 2, axis=-1)
    nothing = (real == 0) & (imaginary == 0)  # has no angle, nor a gradient of one
    angle = jnp.where(nothing, 0, jnp.arctan2(imaginary, jnp.where(nothing, 1, real)))
    turn = (slope - 1)[None, None] * angle + offset[None, None]
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    return jnp.concatenate([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-1).astype(y.dtype)
