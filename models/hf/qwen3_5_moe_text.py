"""Qwen 3.5 with mixtures of experts."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.hf.base import Unfit, register
from plait.models.hf.experts import Experts, Key
from plait.models.hf.qwen3_5_text import Qwen35
from plait.models.hf.transforms import Halves, Transposed


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

    fused: bool = True
    """Whether the experts of a layer are two tensors, as in published models, or three of each expert, as transformers saves them."""

    def table_for(self, model, names):
        apart = f"{self.base}{self.layers_name}.0.{self.expert_names['gate'].format(0)}.weight" in names
        return dataclasses.replace(self, fused=not apart).table(model)

    def routed_lines(self, experts, layer):
        if not self.fused:
            yield from super().routed_lines(experts, layer)
            return
        paths = ("channel_mixer.gate.kernel", "channel_mixer.up.kernel")
        yield layer.line("mlp.experts.gate_up_proj", paths, Halves())
        yield layer.line("mlp.experts.down_proj", "channel_mixer.down.kernel", Transposed())

    def dense(self, values, depth):
        values.only("mlp_only_layers", [])
        values.only("norm_topk_prob", True)
        return [False] * depth

    def dense_values(self, dense):
        if any(dense):
            raise Unfit("a layer has no experts")
        return {}
