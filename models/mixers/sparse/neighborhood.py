"""Neighborhood attention in one dimension: every query sees the same number of nearest keys, at borders too."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from plait.configs.domains import Span
from plait.kernels import Mask, Tokens, attention, attention_rows
from plait.models.build import BuildContext
from plait.models.layers.cache import Slots
from plait.models.mixers.base import Direction, register
from plait.models.mixers.sparse.documents import document_lengths
from plait.models.mixers.sparse.masked import Masked, MaskedConfig
from plait.models.positions.base import Position


@register(
    "neighborhood",
    kind="sparse",
    source="Neighborhood Attention Transformer (2204.07143)",
    proof="the w nearest keys by hand in float64, at both borders",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class NeighborhoodConfig(MaskedConfig):
    """Softmax attention to the w nearest keys: where a document begins or ends the window is moved inwards, not cut.

    Query i of L sees the keys from `s` to `s + w - 1`, `s = min(max(i - floor(w / 2), 0), L - w)`, or all where L <= w. Looking back
    only, the nearest keys are the last w, a sliding window, of which a document's first queries have fewer.
    """

    directions: ClassVar[tuple[Direction, ...]] = ("causal", "bidirectional")

    window_size: Span = 7
    """Keys of a query, itself included, w; 7 as published."""

    @classmethod
    def example(cls) -> NeighborhoodConfig:
        return cls(num_heads=4, head_dim=16, window_size=7)

    def mask(self, num_heads: int, causal: bool) -> Mask:
        if causal:
            return Mask(window_size=self.window_size)
        # of a query that stands where its window begins
        return Mask(causal=False, window_size=1, right_window_size=self.window_size)

    def slots(self) -> Slots:
        return Slots(self.window_size)

    def build(self, d_model: int, ctx: BuildContext) -> Neighborhood:
        return Neighborhood(self, d_model, ctx)


class Neighborhood(Masked):
    """See `NeighborhoodConfig`."""

    config: NeighborhoodConfig

    def __init__(self, config: NeighborhoodConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        if not ctx.causal and self.positions is not None and type(self.positions).bias is not Position.bias:
            raise ValueError(
                "positions must turn or be added, not be a bias on the logits, where a query stands at its window's first token "
                "for the mask; use rotary, or leave them out"
            )

    def sides(self, inputs: Any, at: Tokens) -> dict[str, Any]:
        """Where queries and keys stand for the mask: a query that sees both ways at its window's first token."""
        if self.mask.causal:
            return {"at": at, "kv_at": inputs.kv_at}
        at = at.placed(*inputs.v.shape[:2])
        size = self.config.window_size
        starts = jnp.minimum(at.positions - size // 2, document_lengths(at) - size)
        return {"at": dataclasses.replace(at, positions=jnp.maximum(starts, 0)), "kv_at": at}

    def weigh(self, inputs, *, at):
        return attention(inputs.q, inputs.k, inputs.v, **self.options(inputs, at), **self.sides(inputs, at))

    def implied(self, inputs, rows, *, at):
        return attention_rows(inputs.q, inputs.k, rows=rows, **self.options(inputs, at), **self.sides(inputs, at))

    def attend_active(self, inputs, active, *, at):
        return super().attend_active(inputs, active, at=at) if self.mask.causal else self.weigh(inputs, at=at)

    def observe(self, inputs, x, *, at):
        return super().observe(inputs, x, at=at) if self.mask.causal else {}  # probes look at rows then
