"""Attention whose queries, keys and values pass a short convolution over time: Primer's multi-dconv-head attention."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from plait.configs.domains import Taps
from plait.models.axes import HEADS, KV_HEADS
from plait.models.build import BuildContext
from plait.models.layers.short_conv import ShortConv
from plait.models.mixers.base import Direction, register
from plait.models.mixers.full.convolved import Convolved
from plait.models.mixers.full.dot_product import GroupedConfig
from plait.models.mixers.full.weighted import QKV


def near_identity(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Taps of a convolution as Primer starts them: 1/2 on the current token, 1/2 over the number of taps on each before it."""
    return jnp.full(shape, 0.5 / shape[0], dtype).at[-1].set(0.5)


class ConvolvedHeads(Convolved):
    """Whose queries, keys and values are all convolved. Subclasses set `num_kv_heads` and call `convolved_heads`."""

    convs = ("q_conv", "k_conv", "v_conv")

    def convolved_heads(self, config: Any, d_model: int, ctx: BuildContext) -> None:
        """Makes the projections and their convolutions, one filter a channel of a head."""
        heads = {"q": (self.num_heads, HEADS), "k": (self.num_kv_heads, KV_HEADS), "v": (self.num_kv_heads, KV_HEADS)}
        self.q, self.k, self.v = (self.projection(ctx, d_model, n, config.head_dim, axis) for n, axis in heads.values())
        self.q_conv, self.k_conv, self.v_conv = (
            ShortConv(ctx, n * config.head_dim, size=config.conv_size, axis=axis, activation=None, init=near_identity)
            for n, axis in heads.values()
        )
        self.o = self.projection_back(ctx, d_model, config.head_dim)

    def project(self, x, *, at, state):
        placed = self.placed(x, at)
        streams = {"q_conv": self.q(placed), "k_conv": self.k(placed), "v_conv": self.v(x)}
        (q, k, v), state = self.convolve(streams, at=at, state=state)
        q = self.turned(self.split(q, self.num_heads), at)
        k = self.turned(self.split(k, self.num_kv_heads, KV_HEADS), at)
        return QKV(q, k, self.split(v, self.num_kv_heads, KV_HEADS)), state


@register(
    "mdha",
    kind="full",
    source="Primer: Searching for Efficient Transformers for Language Modeling (2109.08668)",
    proof="torch: conv1d and scaled_dot_product_attention",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MDHAConfig(GroupedConfig):
    """Softmax attention with `q = conv(x W_q)`, and k and v alike: a causal depthwise convolution after the projection, no activation.

    A filter for every channel of a head; it starts at 1/2 on the current token and 1/6 on the two before, as in the authors' code.
    """

    directions: ClassVar[tuple[Direction, ...]] = ("causal",)

    conv_size: Taps = 3
    """Taps of the convolutions."""

    @classmethod
    def example(cls) -> MDHAConfig:
        return cls(num_heads=4, num_kv_heads=2, head_dim=16)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        num_heads, num_kv_heads = self.heads(d_model)
        convolved = (num_heads + 2 * num_kv_heads) * self.head_dim
        return super().mixing_flops(d_model, seq_len) + 2.0 * self.conv_size * convolved

    def build(self, d_model: int, ctx: BuildContext) -> MDHA:
        return MDHA(self, d_model, ctx)


class MDHA(ConvolvedHeads):
    """See `MDHAConfig`."""

    def __init__(self, config: MDHAConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        _, self.num_kv_heads = config.heads(d_model)
        self.convolved_heads(config, d_model, ctx)
