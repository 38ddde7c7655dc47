"""Qwen 3 with mixtures of experts."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.hf.base import register
from plait.models.hf.experts import Experts, Key
from plait.models.hf.qwen3 import Qwen3


@register("qwen3_moe", source="Qwen3 Technical Report (2505.09388)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoE(Experts, Qwen3):
    """See `Experts`."""

    architecture = "Qwen3MoeForCausalLM"
    keys = Fixed(
        {
            "num_experts": Key("num_experts", 128, "num_local_experts"),
            "top_k": Key("num_experts_per_tok", 8),
            "hidden_dim": Key("moe_intermediate_size", 768),
            "normalize": Key("norm_topk_prob", False),
        }
    )

    def attention(self, values, width):
        heads = values("num_attention_heads", int)
        return dataclasses.replace(super().attention(values, width), head_dim=values("head_dim", int, width // heads))

    def windows(self, values, depth):
        used = values("use_sliding_window", bool, False)
        window = values("sliding_window", int, None)
        values.passed_over(("max_window_layers", "layer_types"))
        return [window if used else None] * depth

    def own_values(self, model, mixers):
        window = mixers[0].window_size
        return {"sliding_window": window, "use_sliding_window": window is not None, "attention_bias": mixers[0].qkv_bias}

    def dense(self, values, depth):
        every, alone = values("decoder_sparse_step", int, 1), values("mlp_only_layers", list, [])
        return [index in alone or (index + 1) % every > 0 for index in range(depth)]

    def dense_values(self, dense):
        return {"decoder_sparse_step": 1, "mlp_only_layers": [index for index, alone in enumerate(dense) if alone]}
