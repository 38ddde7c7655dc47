"""OLMo 2: norms after attention and MLP, and of all queries and keys as one."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.hf.base import register
from plait.models.hf.decoder import Decoder


@register("olmo2", source="2 OLMo 2 Furious (2501.00656)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class OLMo2(Decoder):
    """See `Decoder`."""

    architecture = "Olmo2ForCausalLM"
    block = Fixed(
        {
            "post_attention_layernorm.weight": "mixer_norm.scale",
            "post_feedforward_layernorm.weight": "channel_norm.scale",
        }
    )

    def stream(self, values, width):
        return {"norm": "output"}

    def attention(self, values, width):
        eps = values("rms_norm_eps", float, 1e-5)
        return dataclasses.replace(super().attention(values, width), qk_norm=True, qk_norm_over="width", qk_norm_eps=eps)
