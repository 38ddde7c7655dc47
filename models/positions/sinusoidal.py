"""Sines and cosines of each position."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from plait.configs.domains import Base
from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.positions.base import Position, PositionConfig, register
from plait.models.positions.rope import frequencies


@register("sinusoidal", source="Attention Is All You Need (1706.03762)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SinusoidalConfig(PositionConfig):
    """`x_i + p_i`, with `p_i[2c] = sin(i theta^(-2c / D))` and `p_i[2c + 1] = cos(i theta^(-2c / D))`."""

    place = "input"

    theta: Base = 10_000.0
    """Base of the wavelengths, which go from 2 pi to 2 pi theta."""

    def build(self, ctx: BuildContext, width: int, num_heads: int) -> Sinusoidal:
        return Sinusoidal(self)


class Sinusoidal(Position):
    """See `SinusoidalConfig`."""

    def __init__(self, config: SinusoidalConfig):
        self.theta = config.theta

    def add(self, x: jax.Array, at: Tokens) -> jax.Array:
        width = x.shape[-1]
        frequency = jnp.asarray(frequencies(width, self.theta), jnp.float32)
        angle = at.positions.astype(jnp.float32)[..., None] * frequency[None, None]
        waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*angle.shape[:-1], -1)[..., :width]
        return x + waves.astype(x.dtype)
