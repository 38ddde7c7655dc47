"""Granite: Llama with multipliers of the embedding, the halves of a block, the logits of attention and those of the head."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import register
from plait.models.hf.decoder import Decoder
from plait.models.hf.values import written


@register("granite", source="Granite 3.0 Language Models (IBM, 2024)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Granite(Decoder):
    """See `Decoder`."""

    architecture = "GraniteForCausalLM"

    def stream(self, values, width):
        divisor = values.factor("logits_scaling")
        return {
            "embedding_scale": values.factor("embedding_multiplier"),
            "residual_scale": values.factor("residual_multiplier"),
            "logit_scale": None if divisor is None else 1 / divisor,
        }

    def attention(self, values, width):
        return dataclasses.replace(super().attention(values, width), scale=values("attention_multiplier", float, 1.0))

    def own_values(self, model, mixers):
        first = mixers[0]
        return {
            **super().own_values(model, mixers),
            "embedding_multiplier": written(model.embedding_scale),
            "residual_multiplier": written(model.residual_scale),
            "logits_scaling": _divisor(written(model.logit_scale)),
            "attention_multiplier": first.head_dim**-0.5 if first.scale is None else first.scale,
        }


def _divisor(scale: float) -> float:
    """What 1 is divided by for `scale`: the plainest number."""
    return next((number for digits in range(16) if 1 / (number := round(1 / scale, digits) or 1.0) == scale), 1 / scale)
