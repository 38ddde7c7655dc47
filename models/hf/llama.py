"""Llama 1 to 3.x, and what others publish in its form (SmolLM 1 and 2)."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import register
from plait.models.hf.decoder import Decoder


@register("llama", source="The Llama 3 Herd of Models (2407.21783)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama(Decoder):
    """See `Decoder`."""

    architecture = "LlamaForCausalLM"
    ignored = ("model.layers.*.self_attn.rotary_emb.inv_freq",)

    def stream(self, values, width):
        values.passed_over(("is_llama_config",))
        return {}
