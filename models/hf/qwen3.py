"""Qwen 3, dense: Llama with queries and keys normalised by head."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import register
from plait.models.hf.decoder import Decoder
from plait.models.hf.qwen2 import Qwen2


@register("qwen3", source="Qwen3 Technical Report (2505.09388)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3(Qwen2):
    """See `Decoder`."""

    architecture = "Qwen3ForCausalLM"

    def attention(self, values, width):
        mixer = Decoder.attention(self, values, width)
        eps = values("rms_norm_eps", float, 1e-6)
        return dataclasses.replace(mixer, qk_norm=True, qk_norm_eps=eps, head_dim=values("head_dim", int, 128))

    def own_values(self, model, mixers):
        return {**super().own_values(model, mixers), "attention_bias": mixers[0].qkv_bias}
