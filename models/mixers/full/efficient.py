"""Efficient attention: one head whose keys and values are the input."""

from __future__ import annotations

import dataclasses

import jax

from plait.configs.domains import Base
from plait.models.axes import EMBED
from plait.models.build import BuildContext
from plait.models.linear import Dense
from plait.models.mixers.base import MixerConfig, register
from plait.models.mixers.full.weighted import QKV, Cached, mean_keys
from plait.models.mixers.heads import join_heads
from plait.models.rope import rotate


@register(
    "efficient",
    kind="full",
    source="Cost-Effective Attention Mechanisms for Low Resource Settings (2403.01643)",
    proof="softmax attention whose key and value projections are the identity, and the parameters counted",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientConfig(MixerConfig):
    """`y = softmax(x W_Q x^T / sqrt(D)) x W_O`, one head: W_Q makes up for W_K, which is left out, and W_O for W_V.

    Half the parameters of multi-head attention, two products fewer, and a cache of x alone. Queries and keys are rotated here; the paper
    adds positions to the embeddings.
    """

    rope_theta: Base | None = 10_000.0
    """Base of the rotary embedding; None for no position encoding (NoPE)."""

    directions = ("causal", "bidirectional")

    def fit(self, d_model: int) -> None:
        if self.rope_theta is not None and d_model % 2:
            raise ValueError(
                f"rope_theta={self.rope_theta} rotates pairs of d_model={d_model} channels, which is odd; use None for NoPE"
            )
        super().fit(d_model)

    def build(self, d_model: int, ctx: BuildContext) -> Efficient:
        return Efficient(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return 4.0 * d_model * mean_keys(seq_len)


class Efficient(Cached):
    """See `EfficientConfig`."""

    def __init__(self, config: EfficientConfig, d_model: int, ctx: BuildContext):
        super().__init__(ctx)
        self.config, self.num_heads, self.d_model = config, 1, d_model
        self.q = Dense(ctx, d_model, d_model, (EMBED, None))
        self.o = Dense(ctx, d_model, d_model, (None, EMBED), init=ctx.residual_init)

    def rotated(self, y: jax.Array, positions: jax.Array) -> jax.Array:
        """Queries or keys with their positions."""
        return y if self.config.rope_theta is None else rotate(y, positions, self.config.rope_theta)

    def project(self, x, *, at, state):
        q, v = self.q(x)[:, :, None], x.astype(self.dtype)[:, :, None]
        return QKV(self.rotated(q, at.positions), self.rotated(v, at.positions), v), state

    def entries(self):
        return {"x": ((1, self.d_model), None)}

    def kept(self, inputs):
        return {"x": inputs.v}

    def recalled(self, inputs, cache):
        x = cache.entries["x"]
        return inputs._replace(k=self.rotated(x, cache.positions), v=x, kv_at=cache.at)

    def output(self, o):
        return self.o(join_heads(o))
