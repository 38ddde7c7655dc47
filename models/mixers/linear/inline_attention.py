"""InLine attention: injective linear attention, normalised by subtraction, with a local residual."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Heads, Taps
from plait.kernels import Tokens
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.base import register
from plait.models.mixers.heads import join_heads, require_divides
from plait.models.mixers.linear.feature_attention import FeatureAttention, FeatureConfig, Weights
from plait.models.mixers.linear.feature_maps import per_head
from plait.models.mixers.linear.local_conv import Neighbours
from plait.models.mixers.linear.sums import Sums


@register(
    "inline_attention",
    kind="linear",
    source="Bridging the Divide: Reconsidering Softmax and Linear Attention (2412.06590)",
    proof="the authors' InLineAttention; the residual by hand",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class InLineConfig(FeatureConfig):
    """`A_ij = (q_i . (k_j - mean_j k_j) / sqrt(K) + 1) / N` over the N tokens j that i sees: rows sum to 1, weights may be negative.

    To A v comes `sum_w r_w * v_{i+w}` over the nearest tokens, with weights r a channel from an MLP of the mean input, whose two
    matrices are a head's own. Published bidirectional, the residual for images; causal, means end at the token, and so does the residual.
    """

    num_heads: Heads = 8
    """Heads of d_model / num_heads channels."""
    local_size: Taps | None = 3
    """Tokens of the local residual; None for no residual."""

    def check(self) -> None:
        if self.local_size is not None and self.local_size % 2 == 0:
            raise ValueError(f"local_size={self.local_size} must be odd, to have a middle; use {self.local_size + 1}")

    @classmethod
    def example(cls) -> InLineConfig:
        return cls(num_heads=4)

    def heads(self, d_model: int) -> int:
        require_divides(("num_heads", self.num_heads), ("d_model", d_model))
        return self.num_heads

    def sums(self, d_model: int) -> dict[str, tuple[int, int]]:
        dim = d_model // self.heads(d_model)
        inputs = {} if self.local_size is None else {"inputs": (1, dim)}
        return {"memory": (dim, dim), "keys": (dim, 1), "values": (1, dim), **inputs}

    def build(self, d_model: int, ctx: BuildContext) -> InLine:
        return InLine(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        taps = self.local_size or 0
        gather, residual = 2.0 * taps * taps * d_model, 2.0 * taps * d_model
        return super().mixing_flops(d_model, seq_len) + gather + residual


class InLineInputs(NamedTuple):
    q: jax.Array  # [B, T, H, K]
    k: jax.Array
    v: jax.Array
    local: Any  # [B, T, H, K], the local residual, or None


class InLine(FeatureAttention):
    """See `InLineConfig`."""

    def __init__(self, config: InLineConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.dim, self.local_size = d_model // self.num_heads, config.local_size
        self.q, self.k, self.v = (Dense(ctx, d_model, d_model, (EMBED, HEADS), heads=(1, self.num_heads)) for _ in range(3))
        if config.local_size is not None:
            self.convs = ("near",)
            self.near = Neighbours(ctx, d_model, size=config.local_size)
            self.local_up, self.local_down = (
                Dense(ctx, self.dim, width, (HEADS, None, None), lead=(self.num_heads,), use_bias=True)
                for width in (self.dim, config.local_size * self.dim)
            )
        self.o = Dense(ctx, d_model, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads), use_bias=True)

    def project(self, x, *, at, state):
        q, k, v = (self.heads(dense(x)) for dense in (self.q, self.k, self.v))
        local = None
        if self.local_size is not None:
            local, state = self.local(x, v, at=at, state=state)
        return InLineInputs(q.astype(jnp.float32), k.astype(jnp.float32), v, local), state

    def local(self, x: jax.Array, v: jax.Array, *, at: Tokens, state: Any) -> tuple[jax.Array, Any]:
        """The local residual `[B, T, H, V]`, and the state after it."""
        sums = Sums(at, causal=self.causal, state=None if state is None else state.sums)
        mean = (sums.total("inputs", self.heads(x)) / sums.count).astype(x.dtype)
        weights = per_head(self.local_down, jax.nn.gelu(per_head(self.local_up, mean), approximate=False))
        (near,), state = self.convolve({"near": join_heads(v)}, at=at, state=state)
        weights, near = weights.reshape(*v.shape, -1), near.reshape(*x.shape[:2], -1, *v.shape[2:])
        local = jnp.einsum("bthdw,btwhd->bthd", weights, near)
        return local, None if state is None else state._replace(sums={**state.sums, **sums.after})

    def weigh(self, inputs, sums):
        q = self.dim**-0.5 / sums.count * inputs.q
        return Weights(q, inputs.k, (1 - sums.mass("keys", q, inputs.k)) / sums.count)

    def finish(self, o, inputs, x):
        return o if inputs.local is None else o + inputs.local
