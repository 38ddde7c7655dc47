"""DeepSeek V3 and R1: latent attention, and experts by sigmoid scores, in groups, balanced by biases."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.hf.base import register
from plait.models.hf.experts import Key
from plait.models.hf.latent import Latent, count_first, dense_first, read_latent_rope, write_latent_rope


@register("deepseek_v3", source="DeepSeek-V3 Technical Report (2412.19437)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekV3(Latent):
    """See `Experts`. The layer that predicts the token after the next is left out."""

    architecture = "DeepseekV3ForCausalLM"
    mixers = ("mla",)
    behind = "num_nextn_predict_layers"
    ignored = ("model.layers.*.self_attn.rotary_emb.inv_freq",)
    keys = Fixed(
        {
            "num_experts": Key("n_routed_experts", 256),
            "top_k": Key("num_experts_per_tok", 8),
            "hidden_dim": Key("moe_intermediate_size", 2048),
            "num_shared_experts": Key("n_shared_experts", 1),
            "num_groups": Key("n_group", 8),
            "top_k_groups": Key("topk_group", 4),
            "normalize": Key("norm_topk_prob", True),
            "routed_scale": Key("routed_scaling_factor", 2.5),
        }
    )
    options = Fixed({"scores": "sigmoid", "balance_bias": 0.001})

    def stream(self, values, width):
        values.only("scoring_func", "sigmoid")
        values.only("topk_method", "noaux_tc")
        values.only("moe_layer_freq", 1)
        values.passed_over((self.behind, "ep_size"))
        return {}

    def latent_positions(self, values):
        return read_latent_rope(values, interleaved=values("rope_interleave", bool, True))

    def mixer_values(self, model):
        positions = self.latent_layers(model)[0].positions
        neighbours = getattr(positions, "interleaved", True)
        return {
            **super().mixer_values(model),
            "rope_parameters": write_latent_rope(positions, interleaved=neighbours),
            "rope_interleave": neighbours,
            self.behind: 0,
        }

    def dense(self, values, depth):
        return dense_first(values, depth, 3)

    def dense_values(self, dense):
        return count_first(dense)
