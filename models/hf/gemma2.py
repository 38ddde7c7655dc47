"""Gemma 2: norms before and after, windows in every other layer, soft caps."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed
from typing import ClassVar

from plait.models.hf.base import register
from plait.models.hf.decoder import Decoder
from plait.models.hf.windows import FULL, WINDOW, read_windows, write_windows


@register("gemma2", source="Gemma 2 (2408.00118)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2(Decoder):
    """See `Decoder`. Norms multiply by 1 + weight."""

    architecture = "Gemma2ForCausalLM"
    ties = True
    activation_key = "hidden_activation"
    default_activation = "gelu_pytorch_tanh"
    logit_cap: ClassVar[float | None] = 30.0
    attention_cap: ClassVar[float | None] = 50.0
    block = Fixed(
        {
            "input_layernorm.weight": "mixer_norm.scale",
            "post_attention_layernorm.weight": "mixer_out_norm.scale",
            "pre_feedforward_layernorm.weight": "channel_norm.scale",
            "post_feedforward_layernorm.weight": "channel_out_norm.scale",
        }
    )

    def stream(self, values, width):
        values.passed_over(("hidden_act", "use_bidirectional_attention"))
        values.only("use_bidirectional_attention", False)
        return {
            "norm": "both",
            "norm_kind": "rms_1p",
            "embedding_scale": width**0.5,
            "logit_soft_cap": values.or_null("final_logit_softcapping", float, self.logit_cap),
        }

    def attention(self, values, width):
        return dataclasses.replace(
            super().attention(values, width),
            head_dim=values("head_dim", int, 256),
            scale=values("query_pre_attn_scalar", float, 256.0) ** -0.5,
            logit_soft_cap=values.or_null("attn_logit_softcapping", float, self.attention_cap),
        )

    def windows(self, values, depth):
        default = [FULL if (index + 1) % 2 == 0 else WINDOW for index in range(depth)]
        return read_windows(values, depth, default, values.or_null("sliding_window", int, 4096))

    def own_values(self, model, mixers):
        first = mixers[0]
        scalar = round((first.head_dim**-0.5 if first.scale is None else first.scale) ** -2, 6)
        return {
            **super().own_values(model, mixers),
            **write_windows([mixer.window_size for mixer in mixers]),
            "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
            "attn_logit_softcapping": first.logit_soft_cap,
            "final_logit_softcapping": model.logit_soft_cap,
        }
