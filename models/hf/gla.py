"""GLA, as flash-linear-attention writes it."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.hf.base import register
from plait.models.hf.fla import FLA
from plait.models.mixers.heads import expansion
from plait.models.mixers.linear.gla import GLAConfig


@register("gla", source="Gated Linear Attention (2312.06635)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GLA(FLA):
    """See `FLA`."""

    architecture = "GLAForCausalLM"
    mixers = ("gla", "softmax")
    mixer_type = GLAConfig
    renamed = Fixed({"g_norm": "g_norm_swish_gate"})

    def linear(self, values, width):
        heads = values("num_heads", int, 4)
        values.only("num_kv_heads", heads)
        values.only("feature_map")
        values.only("clamp_min")
        values.only("use_short_conv", False)
        values.only("use_output_gate", True)
        values.passed_over(("conv_size", "use_gk", "use_gv"))
        key, value = (round(width * values(name, float, default)) for name, default in (("expand_k", 0.5), ("expand_v", 1.0)))
        eps = values("norm_eps", float, 1e-6)
        return GLAConfig(num_heads=heads, expand_k=expansion(key, width), expand_v=expansion(value, width), norm_eps=eps)

    def linear_values(self, mixer, width):
        return {"num_heads": mixer.num_heads, "expand_k": mixer.expand_k, "expand_v": mixer.expand_v}

    def linear_lines(self, mixer, layer):
        for name in "qkvgo":
            yield from layer.dense(f"attn.{name}_proj", f"mixer.{'gate' if name == 'g' else name}")
        yield from layer.dense("attn.gk_proj.0", "mixer.decay_down")
        yield from layer.dense("attn.gk_proj.1", "mixer.decay_up", bias=True)
        yield layer.same("attn.g_norm_swish_gate.weight", "mixer.norm.scale")
