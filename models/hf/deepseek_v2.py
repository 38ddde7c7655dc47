"""DeepSeek V2 and V2-Lite: latent attention, and experts by softmax scores, in groups or not."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.hf.base import register
from plait.models.hf.experts import Key
from plait.models.hf.latent import Latent, count_first, dense_first, read_latent_rope, write_latent_rope

ALL, GROUPED = "greedy", "group_limited_greedy"
"""Among which experts a token's are chosen."""


@register("deepseek_v2", source="DeepSeek-V2 (2405.04434)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekV2(Latent):
    """See `Experts`. Gates are the scores times a factor."""

    architecture = "DeepseekV2ForCausalLM"
    mixers = ("mla",)
    ignored = ("model.layers.*.self_attn.rotary_emb.inv_freq",)
    keys = Fixed(
        {
            "num_experts": Key("n_routed_experts", 64),
            "top_k": Key("num_experts_per_tok", 6),
            "hidden_dim": Key("moe_intermediate_size", 1407),
            "num_shared_experts": Key("n_shared_experts", 2),
            "routed_scale": Key("routed_scaling_factor", 1.0),
        }
    )
    options = Fixed({"normalize": False})

    def stream(self, values, width):
        values.only("scoring_func", "softmax")
        values.only("norm_topk_prob", False)
        values.only("moe_layer_freq", 1)
        values.only("mlp_bias", False)
        values.passed_over(("ep_size",))
        return {}

    def experts(self, values):
        values.only("topk_method", ALL, GROUPED)
        values.passed_over(("n_group", "topk_group"))
        found = super().experts(values)
        if values("topk_method", str, ALL) == ALL:
            return found
        groups, used = values("n_group", int), values("topk_group", int)
        return dataclasses.replace(found, num_groups=groups, top_k_groups=used, group_score_top_k=1)

    def expert_values(self, experts):
        found = {**super().expert_values(experts), "norm_topk_prob": False, "topk_method": ALL}
        if experts.num_groups > 1:
            found |= {"topk_method": GROUPED, "n_group": experts.num_groups, "topk_group": experts.top_k_groups}
        return found

    def latent_positions(self, values):
        return read_latent_rope(values, interleaved=True)

    def mixer_values(self, model):
        positions = self.latent_layers(model)[0].positions
        return {**super().mixer_values(model), "rope_parameters": write_latent_rope(positions, interleaved=True)}

    def dense(self, values, depth):
        return dense_first(values, depth, 0)

    def dense_values(self, dense):
        return count_first(dense)
