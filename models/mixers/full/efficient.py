"""Efficient attention: one head whose keys and values are the input."""

from __future__ import annotations

import dataclasses

import jax

from plait.configs.components import at as under
from plait.kernels import Tokens
from plait.models.axes import EMBED
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.base import register
from plait.models.mixers.full.dot_product import DotProduct, PositionsConfig
from plait.models.mixers.full.weighted import QKV


@register(
    "efficient",
    kind="full",
    source="Cost-Effective Attention Mechanisms for Low Resource Settings (2403.01643)",
    proof="softmax attention whose key and value projections are the identity, and the parameters counted",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientConfig(PositionsConfig):
    """`y = softmax(x W_Q x^T / sqrt(D)) x W_O`, one head: W_Q makes up for W_K, which is left out, and W_O for W_V.

    Half the parameters of multi-head attention, two products fewer, and a cache of x alone. Queries and keys are turned here; the paper
    adds positions to the embeddings.
    """

    def count_heads(self, d_model: int) -> int:
        return 1

    def maps(self, d_model: int) -> tuple[int, int, int]:
        return 1, d_model, d_model

    def fit(self, d_model: int) -> None:
        if self.positions is not None:
            under("positions", self.positions.fit, d_model)
        super().fit(d_model)

    def build(self, d_model: int, ctx: BuildContext) -> Efficient:
        return Efficient(self, d_model, ctx)


class Efficient(DotProduct):
    """See `EfficientConfig`."""

    num_kv_heads = 1

    def __init__(self, config: EfficientConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.width = d_model
        self.q = Dense(ctx, d_model, d_model, (EMBED, None))
        self.o = Dense(ctx, d_model, d_model, (None, EMBED), init=ctx.residual_init)

    def keys(self, x: jax.Array, at: Tokens) -> jax.Array:
        """`[B, S, 1, D]` of the input `[B, S, D]`."""
        return self.turned(self.placed(x, at)[:, :, None], at)

    def project(self, x, *, at, state):
        x = x.astype(self.dtype)
        q = self.turned(self.q(self.placed(x, at))[:, :, None], at)
        return QKV(q, self.keys(x, at), x[:, :, None]), state

    def entries(self):
        return {"x": ((1, self.width), None)}

    def kept(self, inputs):
        return {"x": inputs.v}

    def recalled(self, inputs, cache):
        x = cache.entries["x"]
        return inputs._replace(k=self.keys(x[:, :, 0], cache.at), v=x, kv_at=cache.at)
