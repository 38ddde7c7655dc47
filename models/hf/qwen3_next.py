"""Qwen3-Next: Qwen 3.5's layers with mixtures of experts, inputs of a linear layer as two tensors, by key head."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.hf.base import register
from plait.models.hf.experts import Experts, Key
from plait.models.hf.qwen3_5_text import Qwen35
from plait.models.hf.transforms import Fused


@register("qwen3_next", source="Qwen3-Next (Qwen, 2025); Gated Attention (2505.06708)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Next(Experts, Qwen35):
    """See `Experts` and `Decoder`. Heads that predict tokens further ahead (`mtp`) are left out."""

    architecture = "Qwen3NextForCausalLM"
    keys = Fixed(
        {
            "num_experts": Key("num_experts", 512),
            "top_k": Key("num_experts_per_tok", 10),
            "hidden_dim": Key("moe_intermediate_size", 512),
            "shared_hidden_dim": Key("shared_expert_intermediate_size", 512),
            "normalize": Key("norm_topk_prob", True),
        }
    )
    options = Fixed({"num_shared_experts": 1, "shared_gate": True})
    expert_names = Fixed({**Experts.expert_names, "shared": "mlp.shared_expert"})

    def dense(self, values, depth):
        every, alone = values("decoder_sparse_step", int, 1), values("mlp_only_layers", list, [])
        return [index in alone or (index + 1) % every > 0 for index in range(depth)]

    def dense_values(self, dense):
        return {"decoder_sparse_step": 1, "mlp_only_layers": [index for index, alone in enumerate(dense) if alone]}

    def input_lines(self, sizes, groups, v_heads, layer):
        paths = tuple(f"mixer.{name}" for name in ("q", "k", "v", "gate"))
        yield from layer.fused("linear_attn.in_proj_qkvz", paths, Fused((*sizes, sizes[-1]), groups=groups))
        yield from layer.fused("linear_attn.in_proj_ba", ("mixer.b", "mixer.a"), Fused((v_heads, v_heads), groups=groups))
