"""Mistral: Llama with a window in every layer, or in none."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import register
from plait.models.hf.decoder import Decoder


@register("mistral", source="Mistral 7B (2310.06825)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mistral(Decoder):
    """See `Decoder`."""

    architecture = "MistralForCausalLM"

    def windows(self, values, depth):
        values.passed_over(("layer_types",))
        return [values("sliding_window", int, None)] * depth

    def own_values(self, model, mixers):
        return {"sliding_window": mixers[0].window_size}
