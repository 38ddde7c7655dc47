"""Super attention: efficient attention over values that a learned kernel has mixed along time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from plait.configs.domains import Length
from plait.kernels import Tokens, weighted_attention, weighted_rows
from plait.kernels.weighted_attention import Rule
from plait.models.build import BuildContext
from plait.models.mixers.base import register
from plait.models.mixers.full.efficient import Efficient, EfficientConfig
from plait.models.mixers.full.weighted import mean_keys


@register(
    "super_attention",
    kind="full",
    source="Cost-Effective Attention Mechanisms for Low Resource Settings (2403.01643)",
    proof="the formula in float64, efficient attention at its start, and the parameters counted",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperAttentionConfig(EfficientConfig):
    """`y = softmax(x W_Q x^T / sqrt(D)) W_A x W_O`: `efficient` over values mixed by a learned `max_len` x `max_len` kernel W_A.

    Rows and columns of W_A are positions in the document; causal, only its lower triangle is used. It fixes the longest sequence, as
    nothing says what stands beyond it. The paper does not say how W_A starts; here at the identity, as `efficient`. W_A is applied by
    blocks of rows; implied attention, which is the product of softmax and W_A, is the one thing that holds all of its T x T.
    """

    max_len: Length = 1024
    """Tokens of the longest sequence, in training and decoding."""

    @classmethod
    def example(cls) -> SuperAttentionConfig:
        return cls(max_len=96)

    @property
    def longest(self) -> int:
        return self.max_len

    def build(self, d_model: int, ctx: BuildContext) -> SuperAttention:
        self.require(ctx.seq_len, "the training length")
        return SuperAttention(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return super().mixing_flops(d_model, seq_len) + 2.0 * d_model * mean_keys(seq_len)

    def require(self, length: int, what: str) -> None:
        """Raises ValueError where W_A has no row for the last of so many tokens."""
        if length > self.max_len:
            raise ValueError(
                f"max_len={self.max_len} must be at least {what}, {length} tokens: super_attention's kernel has no rows beyond it; "
                f"train with max_len={length}, or use shorter sequences"
            )


@dataclasses.dataclass(frozen=True)
class PositionKernel(Rule):
    """Weights `W_A[m, n]` of positions m and n, whatever the tokens are."""

    def __call__(self, q, k, parameters, seen):
        rows = jnp.take(parameters.astype(jnp.promote_types(q.dtype, jnp.float32)), seen.queries.positions, axis=0, mode="clip")
        a = jnp.take_along_axis(rows, seen.keys.positions[:, None, :], axis=2, mode="clip")  # [B, R, S]
        return jnp.where(seen.visible, a[:, None], 0)


class SuperAttention(Efficient):
    """See `SuperAttentionConfig`."""

    config: SuperAttentionConfig

    def __init__(self, config: SuperAttentionConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        identity = lambda key, shape, dtype: jnp.eye(shape[0], dtype=dtype)
        self.kernel = ctx.param(identity, (config.max_len, config.max_len), (None, None), role="conv")

    @property
    def _kernel(self) -> dict[str, Any]:
        return {"rule": PositionKernel(), "parameters": self.kernel[...], "mask": self.mask}

    def project(self, x, *, at, state):
        self.config.require(x.shape[1], "the sequence")
        return super().project(x, at=at, state=state)

    def mixed(self, x: jax.Array, *, at: Tokens, kv: jax.Array | None = None, kv_at: Tokens | None = None) -> jax.Array:
        """`W_A x` `[B, T, 1, D]` at the tokens `at`, of the same tokens or of others."""
        kv = x if kv is None else kv
        return weighted_attention(x[..., :1], kv[..., :1], kv, at=at, kv_at=kv_at, **self._kernel)

    def weigh(self, inputs, *, at):
        return super().weigh(inputs._replace(v=self.mixed(inputs.v, at=at)), at=at)

    def attend_active(self, inputs, active, *, at):
        return self.weigh(inputs, at=at)

    def implied(self, inputs, rows, *, at):
        x = inputs.v[..., :1]
        kernel = weighted_rows(x, x, jnp.arange(x.shape[1]), at=at, **self._kernel)
        return jnp.einsum("bhrj,bhjs->bhrs", super().implied(inputs, rows, at=at), kernel, precision="highest")

    def observe(self, inputs, x, *, at):
        return {}  # statistics are those of the product's rows

    def init_state(self, batch_size, max_len):
        """Caches of x, and of the mixed values of the tokens that it holds."""
        self.config.require(max_len, "the longest decoded sequence")
        return super().init_state(batch_size, max_len), super().init_state(batch_size, max_len)

    def attend(self, inputs, *, at, state):
        if state is None:
            return super().attend(inputs, at=at, state=None)
        mixed = self.mixed(inputs.v, at=at)
        state = tuple(self.slots.write(cache, {"x": x}, at) for cache, x in zip(state, (inputs.v, mixed), strict=True))
        return super().weigh(inputs._replace(v=mixed), at=at), state

    def recall(self, inputs, carry, *, at, state):
        (cache, values), x = state, inputs.v
        inputs, carry, cache = super().recall(inputs, carry, at=at, state=cache)
        values = self.slots.write(values, {"x": self.mixed(x, at=at, kv=inputs.v, kv_at=inputs.kv_at)}, at)
        return inputs._replace(v=values.entries["x"]), carry, (cache, values)

    def attend_step(self, inputs, *, at, state):
        return super().weigh(inputs, at=at), state
