"""Bamba: Mamba-2 with attention, half of each head turned, between its layers."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.hf.base import register
from plait.models.hf.hybrid import Hybrid
from plait.models.hf.rope import read_rope, write_rope
from plait.models.hf.ssm import KEYS, first_of, mamba2_lines, read_mamba2, whole_expand, write_mamba2
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.mamba2 import Mamba2Config


@register("bamba", source="Bamba: Inference-Efficient Hybrid Mamba2 Model (IBM, Princeton, CMU and UIUC, 2024)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Bamba(Hybrid):
    """See `Decoder`."""

    architecture = "BambaForCausalLM"
    mixers = ("mamba2", "softmax")
    default_eps = 1e-5
    around = Fixed({"embed_tokens.weight": "embedding", "final_layernorm.weight": "norm.scale"})
    block = Fixed({"input_layernorm.weight": "mixer_norm.scale", "pre_ff_layernorm.weight": "channel_norm.scale"})
    mlp_names = Fixed({name: f"feed_forward.{name}_proj" for name in ("gate", "up", "down")})

    def stream(self, values, width):
        values.passed_over(("num_logits_to_keep", "z_loss_coefficient"))
        return {}

    def attends(self, values, depth):
        numbers = values("attn_layer_indices", list, [])
        return [index in numbers for index in range(depth)]

    def attention(self, values, width):
        found = super().attention(values, width)
        values.only("attn_rotary_emb", found.head_dim // 2)
        return found

    def positions(self, values, window):
        return read_rope(values, max_len=values("max_position_embeddings", int, 262_144), default_fraction=0.5)

    def rope(self, mixers):
        return {"partial_rotary_factor": 1.0, **write_rope(mixers[0].positions)}

    def linear(self, values, width):
        return read_mamba2(values, width, norm_eps=values("rms_norm_eps", float, 1e-5))

    def own_values(self, model, mixers):
        mamba = first_of(model, Mamba2Config)
        full = [index for index, mixer in enumerate(model.layer_mixers) if isinstance(mixer, SoftmaxConfig)]
        return {
            **super().own_values(model, mixers),
            "attn_layer_indices": full,
            **write_mamba2(mamba, model.d_model),
            KEYS["expand"]: whole_expand(mamba.expand),
        }

    def mixer_lines(self, mixer, width, layer):
        if isinstance(mixer, Mamba2Config):
            yield from mamba2_lines(layer, "mamba", mixer, width)
        else:
            yield from super().mixer_lines(mixer, width, layer)
