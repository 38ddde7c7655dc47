"""RetNet, as flash-linear-attention writes it."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.hf.base import register
from plait.models.hf.fla import FLA
from plait.models.mixers.heads import expansion
from plait.models.mixers.linear.retnet import RetNetConfig


@register("retnet", source="Retentive Network (2307.08621)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RetNet(FLA):
    """See `FLA`."""

    architecture = "RetNetForCausalLM"
    mixers = ("retnet", "softmax")
    mixer_type = RetNetConfig
    renamed = Fixed({"g_norm": "g_norm_swish_gate"})
    hidden_ratio = 2

    def linear(self, values, width):
        heads = values("num_heads", int, 8)
        values.only("num_kv_heads", heads)
        values.only("feature_map")
        values.only("expand_k", 1)
        values.only("use_short_conv", False)
        values.only("use_output_gate", True)
        values.passed_over(("conv_size",))
        value = round(width * values("expand_v", float, 2.0))
        return RetNetConfig(num_heads=heads, expand_v=expansion(value, width), norm_eps=values("norm_eps", float, 1e-6))

    def linear_values(self, mixer, width):
        return {"num_heads": mixer.num_heads, "expand_k": 1.0, "expand_v": mixer.expand_v}

    def linear_lines(self, mixer, layer):
        for name in "qkvgo":
            yield from layer.dense(f"attn.{name}_proj", f"mixer.{'gate' if name == 'g' else name}")
        yield layer.same("attn.g_norm_swish_gate.weight", "mixer.norm.scale")
