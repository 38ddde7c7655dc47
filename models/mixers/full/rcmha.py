"""Convolved heads with relative positions in the scores, as Transformer-XL has them."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Taps, Whole
from plait.kernels import LowRankBias, Tokens
from plait.kernels.attention.bias import folded_columns
from plait.models.axes import HEADS
from plait.models.build import BuildContext
from plait.models.mixers.base import Direction, register
from plait.models.mixers.full.dot_product import HeadsConfig
from plait.models.mixers.full.mdha import ConvolvedHeads
from plait.models.mixers.full.weighted import mean_keys
from plait.models.mixers.heads import split_heads

_BASE = 10_000.0


@register(
    "rcmha",
    kind="full",
    source="RCMHA: Relative Convolutional Multi-Head Attention (2308.03429); Transformer-XL (1901.02860)",
    proof="transformers: XLNet's relative scores, behind torch's conv1d",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RCMHAConfig(HeadsConfig):
    """`z_ij = ((q_i + u) . k_j + (q_i + v) . W_r r_{i-j}) / sqrt(K)`, q, k and values convolved as in `mdha`, u and v learned a head.

    `r_n = (sin(n f), cos(n f))`, f from 1 down to 1 / 10,000. The sine and cosine of i - j are sums of products of one of i and one of
    j, so the second term is exact as `position_dim` more columns of queries and keys: no T x T array, at `position_dim` more
    multiply-adds a score. The authors' code has a learned table of distances in place of W_r r, and no other details are published.
    """

    directions: ClassVar[tuple[Direction, ...]] = ("causal",)

    conv_size: Taps = 3
    """Taps of the convolutions."""
    position_dim: Annotated[int, Whole(2, 2**16)] | None = None
    """Channels of r, an even number; None gives d_model, as in Transformer-XL."""

    def check(self) -> None:
        if self.position_dim is not None and self.position_dim % 2:
            raise ValueError(
                f"position_dim={self.position_dim} must be even, a sine and a cosine of each frequency; use {self.position_dim + 1}"
            )

    def position_channels(self, d_model: int) -> int:
        """Channels of r at width `d_model`."""
        width = self.position_dim or d_model
        if width % 2:
            raise ValueError(f"position_dim=None is d_model={d_model}, which must be even; use position_dim={d_model + 1}")
        return width

    @classmethod
    def example(cls) -> RCMHAConfig:
        return cls(num_heads=4, head_dim=16, position_dim=16)

    def fit(self, d_model: int) -> None:
        self.position_channels(d_model)
        super().fit(d_model)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        num_heads = self.count_heads(d_model)
        relative = num_heads * folded_columns(self.position_channels(d_model), self.head_dim) * mean_keys(seq_len)
        convolved = self.conv_size * 3 * num_heads * self.head_dim
        return super().mixing_flops(d_model, seq_len) + 2.0 * (relative + convolved)

    def build(self, d_model: int, ctx: BuildContext) -> RCMHA:
        return RCMHA(self, d_model, ctx)


class Relative(NamedTuple):
    """Projected heads, and the columns that make the scores relative."""

    q: jax.Array  # [B, T, H, K], u added
    k: jax.Array  # [B, S, H, K]
    v: jax.Array  # [B, S, H, K]
    q_columns: jax.Array  # [B, T, H, R]
    k_columns: jax.Array  # [B, S, 1, R]
    kv_at: Tokens | None = None


class RCMHA(ConvolvedHeads):
    """See `RCMHAConfig`."""

    def __init__(self, config: RCMHAConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.num_kv_heads = self.num_heads
        self.convolved_heads(config, d_model, ctx)
        self.r = self.projection(ctx, config.position_channels(d_model), self.num_heads, config.head_dim)
        bias = jax.nn.initializers.normal(0.02)
        self.u, self.w = (ctx.param(bias, (self.num_heads, config.head_dim), (HEADS, None)) for _ in range(2))

    def waves(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sine and cosine of positions `[B, T]` at every frequency, `[B, T, 1, R / 2]` float32."""
        half = self.r.kernel.shape[-2] // 2
        frequency = _BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
        return jnp.sin(angle), jnp.cos(angle)

    def project(self, x, *, at, state):
        (q, k, v, _, _), state = super().project(x, at=at, state=state)
        content, position = (q + bias[...].astype(q.dtype)[None, None] for bias in (self.u, self.w))
        r = split_heads(self.r.weight().astype(q.dtype), self.num_heads)  # [R, H, K]
        of_sine, of_cosine = jnp.split(jnp.einsum("bthk,rhk->bthr", position, r).astype(jnp.float32), 2, axis=-1)
        sine, cosine = self.waves(at.positions)
        # sin(i - j) = sin i cos j - cos i sin j, cos(i - j) = sin i sin j + cos i cos j
        columns = [of_cosine * sine - of_sine * cosine, of_sine * sine + of_cosine * cosine]
        q_columns = (jnp.concatenate(columns, axis=-1) * self.scale).astype(q.dtype)
        return Relative(content, k, v, q_columns, self.k_columns(at.positions)), state

    def k_columns(self, positions: jax.Array) -> jax.Array:
        """Those of keys at `positions` `[B, S]`."""
        return jnp.concatenate(self.waves(positions), axis=-1).astype(self.dtype)

    def recalled(self, inputs, cache):
        return super().recalled(inputs, cache)._replace(k_columns=self.k_columns(cache.positions))

    def options(self, inputs: Any, at: Tokens) -> dict[str, Any]:
        return {**super().options(inputs, at), "bias": LowRankBias(inputs.q_columns, inputs.k_columns)}
