"""Gaussian adaptive attention: each channel of a token is weighed by how it stands in the distribution of its head's channels."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from plait.configs.domains import Heads, Whole
from plait.models.build import BuildContext
from plait.models.channel_mixers.base import ChannelMixer, ChannelMixerConfig, MixedChannels, register
from plait.models.mixers.heads import join_heads, require_divides, split_heads


@register("gaam", source="Gaussian Adaptive Attention is All You Need (2401.11143)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GAAMConfig(ChannelMixerConfig):
    """`y = x * m`, `m = prod_n N(x; mu + delta_n, (c_n s)^2) / sum` over the d_model / num_heads channels of a head and a token.

    mu and s^2 are the mean and the unbiased variance of these channels; delta and c are learned for each head and Gaussian, delta from
    0 and c, kept as its logarithm, from exp(N(0, 1)) on. There is no projection. The paper calls it attention over features: no
    token sees another, so that it stands beside the MLP and not beside token mixers. Its code can take another axis; along time it
    would look ahead.
    """

    num_heads: Heads = 4
    """Chunks of channels with Gaussians of their own; a divisor of d_model."""
    num_gaussians: Annotated[int, Whole(1, 256)] = 4
    """Gaussians that are multiplied."""

    def fit(self, d_model: int) -> None:
        require_divides(("num_heads", self.num_heads), ("d_model", d_model))
        if d_model == self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} leaves one channel of d_model={d_model} to a head, which has no variance; use fewer"
            )

    def build(self, d_model: int, ctx: BuildContext) -> GAAM:
        return GAAM(self, d_model, ctx)


class GAAM(ChannelMixer):
    """See `GAAMConfig`."""

    def __init__(self, config: GAAMConfig, d_model: int, ctx: BuildContext):
        self.num_heads = config.num_heads
        shape = (config.num_heads, config.num_gaussians)
        self.offset = ctx.param(jax.nn.initializers.zeros, shape, (None, None))
        self.log_width = ctx.param(jax.random.normal, shape, (None, None))

    def __call__(self, x, *, at):
        heads = split_heads(x.astype(jnp.float32), self.num_heads)[..., None]  # [B, T, H, K, 1]
        mean, variance = jnp.mean(heads, axis=3, keepdims=True), jnp.var(heads, axis=3, keepdims=True, ddof=1) + 1e-8
        offset, log_width = (p[...].astype(jnp.float32)[None, None, :, None] for p in (self.offset, self.log_width))
        exponents = jnp.square(heads - mean - offset) / (2 * variance * jnp.exp(2 * log_width))
        m = jax.nn.softmax(-jnp.sum(exponents, axis=-1), axis=-1)  # what does not depend on the channel cancels
        return MixedChannels(join_heads(heads[..., 0] * m).astype(x.dtype))
