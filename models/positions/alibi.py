"""A penalty that grows with the distance, at another rate for each head."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels import Bias, DistanceBias, LowRankBias, Tokens
from plait.models.build import BuildContext
from plait.models.positions.base import Position, PositionConfig, register

_BYTES = (1, 1 << 8, 1 << 16)
"""A position is a sum of three of these, each as often as 8 bits say."""


@register("alibi", source="Train Short, Test Long (2108.12409); bidirectional as in MosaicBERT (2312.17482)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ALiBiConfig(PositionConfig):
    """`z_ij - m_h |i - j|` with `m_h = 2^(-8h / H)`, h = 1, ..., H.

    Where H is no power of two, the heads have the slopes of the power below it, and then every other slope of twice that power.
    Causal, it is of low rank, `-m i + m j`, and folded into queries and keys (FlashBias, 2505.12044), so that it runs on every kernel.
    The columns are sums that 16 bits hold exactly, of a slope that is rounded to 16 bits of its mantissa: what is left of an error is
    that of adding float32 numbers of the size of m i. |i - j| is not of low rank: bidirectional, it is a bias by distance.
    """

    place = "logits"
    bias_rank = 9

    def build(self, ctx: BuildContext, width: int, num_heads: int) -> ALiBi:
        return ALiBi(num_heads, ctx.causal)


def slopes(num_heads: int) -> np.ndarray:
    """`[H]` float64, steepest first."""
    power = 1 << (num_heads.bit_length() - 1)
    even = lambda count: 2.0 ** (-8 / count * np.arange(1, count + 1))
    return np.concatenate([even(power), even(2 * power)[::2][: num_heads - power]])


class ALiBi(Position):
    """See `ALiBiConfig`."""

    def __init__(self, num_heads: int, causal: bool):
        self.num_heads, self.causal = num_heads, causal

    def bias(self, at: Tokens, kv_at: Tokens, *, scale: float) -> Bias:
        if not self.causal:
            return DistanceBias(slopes=jnp.asarray(slopes(self.num_heads), jnp.float32))
        slope = slopes(self.num_heads) / scale
        high = slope.astype(jnp.bfloat16).astype(np.float64)
        low = (slope - high).astype(jnp.bfloat16).astype(np.float64)
        rows = _in_16_bits(-at.positions.astype(jnp.float32)[..., None] * _constant(high + low)[None, None])  # [B, T, H, 3]
        rates = _constant(np.repeat(np.stack([high, low], -1), len(_BYTES), axis=-1))  # [H, 6]
        rates = jnp.broadcast_to(rates[None, None], (*rows.shape[:3], rates.shape[-1]))
        digits = jnp.stack([kv_at.positions // size % 256 * size for size in _BYTES], axis=-1).astype(jnp.float32)  # [B, S, 3]
        keys = jnp.concatenate([jnp.ones_like(digits), digits, digits], axis=-1)[:, :, None]
        return LowRankBias(scale * jnp.concatenate([rows, rates], axis=-1), keys)


def _constant(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _in_16_bits(x: jax.Array) -> jax.Array:
    """Three numbers of 8 bits each, `[..., 3]`, whose sum is `x` in float32.

    The compiler may take a cast to bfloat16 and back for nothing; this rounding it keeps.
    """
    parts = []
    for _ in range(3):
        parts.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - parts[-1]
    return jnp.stack(parts, axis=-1)
