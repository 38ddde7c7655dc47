"""What attention mixers share whose weights are no softmax of scaled dot products: a rule gives them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import jax

from plait.kernels import Tokens, weighted_attention, weighted_rows
from plait.kernels.weighted_attention import Rule
from plait.models.axes import HEADS, KV_HEADS
from plait.models.build import BuildContext
from plait.models.mixers.base import Direction
from plait.models.mixers.full.dot_product import DotProduct, GroupedConfig
from plait.models.mixers.full.weighted import QKV, mean_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleConfig(GroupedConfig):
    """Heads whose weights are a rule's."""

    directions: ClassVar[tuple[Direction, ...]] = ("causal",)

    def check(self) -> None:
        super().check()
        if self.positions is not None and self.positions.place == "logits":
            raise ValueError(
                f"positions={self.positions.name} adds to the logits of a softmax, which the weights of {self.name} are not; use rotary, "
                "another that acts on heads or the input, or None for NoPE"
            )

    @classmethod
    def example(cls) -> Self:
        return cls(num_heads=4, head_dim=16)

    def pair_flops(self) -> float:
        """Operations for a head, a query and a key that it sees: the logit, and the value's share of the output."""
        return 4.0 * self.head_dim

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return self.pair_flops() * self.heads(d_model)[0] * mean_keys(seq_len)


class MultiHead(DotProduct):
    """The usual projections: queries, keys, values and output, by heads."""

    def __init__(self, config: GroupedConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        _, self.num_kv_heads = config.heads(d_model)
        self.q = self.projection(ctx, d_model, self.num_heads, config.head_dim)
        self.k, self.v = (self.projection(ctx, d_model, self.num_kv_heads, config.head_dim, KV_HEADS) for _ in range(2))
        self.o = self.projection_back(ctx, d_model, config.head_dim)

    def prepared(self, q: jax.Array, k: jax.Array, *, at: Tokens) -> tuple[jax.Array, jax.Array]:
        """Queries `[B, T, H, K]` and keys `[B, T, Hkv, K]` as their products and the cache take them: turned by their positions."""
        return self.turned(q, at), self.turned(k, at)

    def project(self, x, *, at, state):
        placed = self.placed(x, at)
        q, k = self.split(self.q(placed), self.num_heads, HEADS), self.split(self.k(placed), self.num_kv_heads, KV_HEADS)
        return QKV(*self.prepared(q, k, at=at), self.split(self.v(x), self.num_kv_heads, KV_HEADS)), state


class ByRule(MultiHead):
    """Multi-head attention by a rule."""

    def __init__(self, config: RuleConfig, d_model: int, ctx: BuildContext, rule: Rule):
        super().__init__(config, d_model, ctx)
        self.rule = rule

    def parameters(self) -> Any:
        """The arrays of the rule."""
        return None

    def options(self, inputs, at):
        return {"rule": self.rule, "parameters": self.parameters(), "mask": self.mask}

    def weigh(self, inputs, *, at):
        options = self.options(inputs, at)
        return weighted_attention(*inputs[:3], at=at, kv_at=inputs.kv_at, before=inputs.before, **options)

    def attend_active(self, inputs, active, *, at):
        return self.weigh(inputs, at=at)

    def implied(self, inputs, rows, *, at):
        return weighted_rows(inputs.q, inputs.k, rows, at=at, **self.options(inputs, at))

    def observe(self, inputs, x, *, at):
        return {}  # statistics are those of the rows
