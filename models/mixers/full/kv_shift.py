"""Attention whose keys and values are mixed with those of the previous token: an induction head in one layer."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from plait.models.axes import HEADS, KV_HEADS
from plait.models.build import BuildContext
from plait.models.layers.short_conv import ShortConv
from plait.models.mixers.base import Direction, register
from plait.models.mixers.full.convolved import Convolved
from plait.models.mixers.full.dot_product import GroupedConfig
from plait.models.mixers.full.weighted import QKV


@register(
    "kv_shift",
    kind="full",
    source="KV Shifting Attention Enhances Language Modeling (2411.19574)",
    proof="three tokens by hand, the induction head of theorem 1, softmax without a shift",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVShiftConfig(GroupedConfig):
    """Softmax attention to `k'_t = a_1 k_t + a_2 k_{t-1}` with values `v'_t = b_1 v_t + b_2 v_{t-1}`, nothing before a document.

    The four numbers are learned for each key and value head; a_2 and b_2 start uniform in [0, 1), a_1 and b_1 at what is left to 1.
    Keys are shifted before they are turned by their positions, as in the paper's code.
    """

    directions: ClassVar[tuple[Direction, ...]] = ("causal",)

    @classmethod
    def example(cls) -> KVShiftConfig:
        return cls(num_heads=4, num_kv_heads=2, head_dim=16)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        shifted = 2 * self.heads(d_model)[1] * self.head_dim
        return super().mixing_flops(d_model, seq_len) + 2.0 * 2 * shifted

    def build(self, d_model: int, ctx: BuildContext) -> KVShift:
        return KVShift(self, d_model, ctx)


def _start(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    before = jax.random.uniform(key, shape[1:], dtype)
    return jnp.stack([before, 1 - before])


class KVShift(Convolved):
    """See `KVShiftConfig`."""

    convs = ("k_shift", "v_shift")

    def __init__(self, config: KVShiftConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        _, self.num_kv_heads = config.heads(d_model)
        self.q = self.projection(ctx, d_model, self.num_heads, config.head_dim, HEADS)
        self.k, self.v = (self.projection(ctx, d_model, self.num_kv_heads, config.head_dim, KV_HEADS) for _ in range(2))
        self.k_shift, self.v_shift = (
            ShortConv(
                ctx,
                self.num_kv_heads * config.head_dim,
                size=2,
                axis=KV_HEADS,
                activation=None,
                init=_start,
                filters=self.num_kv_heads,
            )
            for _ in range(2)
        )
        self.o = self.projection_back(ctx, d_model, config.head_dim)

    def project(self, x, *, at, state):
        placed = self.placed(x, at)
        (k, v), state = self.convolve({"k_shift": self.k(placed), "v_shift": self.v(x)}, at=at, state=state)
        q = self.turned(self.split(self.q(placed), self.num_heads), at)
        k = self.turned(self.split(k, self.num_kv_heads, KV_HEADS), at)
        return QKV(q, k, self.split(v, self.num_kv_heads, KV_HEADS)), state
