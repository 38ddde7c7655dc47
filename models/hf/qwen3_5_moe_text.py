"""Qwen 3.5 with mixtures of experts."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.hf.base import Unfit, register
from plait.models.hf.experts import Experts, Key
from plait.models.hf.qwen3_5_text import Qwen35


@register("qwen3_5_moe_text", source="Qwen3.5 (Qwen, 2026); Gated Attention (2505.06708)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen35MoE(Experts, Qwen35):
    """See `Experts` and `Decoder`. Heads that predict tokens further ahead (`mtp`) are left out."""

    architecture = "Qwen3_5MoeForCausalLM"
    keys = Fixed(
        {
            "num_experts": Key("num_experts", 256),
            "top_k": Key("num_experts_per_tok", 8),
            "hidden_dim": Key("moe_intermediate_size", 512),
            "shared_hidden_dim": Key("shared_expert_intermediate_size", 512),
        }
    )
    options = Fixed({"num_shared_experts": 1, "shared_gate": True})
    expert_names = Fixed({**Experts.expert_names, "shared": "mlp.shared_expert"})

    def dense(self, values, depth):
        values.only("mlp_only_layers", [])
        values.only("norm_topk_prob", True)
        return [False] * depth

    def dense_values(self, dense):
        if any(dense):
            raise Unfit("a layer has no experts")
        return {}
