"""Ling 3: Kimi delta attention with bounded decays, gated latent attention in the last layer of every group, experts."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.hf.base import Unfit, register
from plait.models.hf.experts import Experts, Key
from plait.models.hf.kimi_linear import KimiLinear
from plait.models.hf.latent import read_latent_rope, write_latent_rope
from plait.models.hf.windows import FULL, LINEAR
from plait.models.mixers.full.mla import MLAConfig
from plait.models.mixers.linear.kda import KDAConfig


@register("bailing_hybrid", source="Ling 3.0 (inclusionAI, 2026)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BailingHybrid(KimiLinear):
    """See `KimiLinear`. Layers that predict further ahead are left out."""

    architecture = "BailingHybridForCausalLM"
    mixers = ("kda", "mla")
    around = Fixed({"word_embeddings.weight": "embedding", "norm.weight": "norm.scale"})
    renamed = Fixed({"embed_tokens": "word_embeddings"})
    default_eps = 1e-6
    default_dense = 2
    mixer_name = "attention"
    o_name = "dense"
    mlp_names = Experts.mlp_names
    expert_names = Fixed({**Experts.expert_names, "bias": "mlp.gate.expert_bias"})
    keys = Fixed(
        {
            **KimiLinear.keys,
            "num_experts": Key("num_experts", 512, "num_local_experts"),
            "hidden_dim": Key("moe_intermediate_size", 768),
            "top_k": Key("num_experts_per_tok", 8, "num_experts_per_token"),
            "num_groups": Key("n_group", 8, "num_expert_group"),
            "top_k_groups": Key("topk_group", 4),
            "normalize": Key("norm_topk_prob", True, "moe_renormalize"),
            "routed_scale": Key("routed_scaling_factor", 2.5),
        }
    )

    def stream(self, values, width):
        values.only("hidden_act", "silu", "swish")  # of the convolutions too
        values.only("score_function", "sigmoid")
        values.only("no_kda_lora", True)
        values.only("use_qkv_bias", False)
        values.only("use_bias", False)
        values.only("rope_interleave", True)
        values.only("gated_attention_proj_granularity_type", "head_wise")
        values.only("moe_router_enable_expert_bias", True)
        inner = values("moe_intermediate_size", int, 768) * values("num_shared_experts", int, values("n_shared_experts", int, 1))
        values.only("moe_shared_expert_intermediate_size", inner)
        values.passed_over((self.behind, "model_max_length", "layer_group_size", "mtp_loss_scaling_factor", "use_qk_norm"))
        return {}

    def default_types(self, values, depth):
        size = values("layer_group_size", int, 6)
        if depth % size and "layer_types" not in values:
            raise Unfit(f"config.json: {depth} layers are no groups of {size}, and readers differ in the rest; give layer_types")
        return [FULL if (index + 1) % size == 0 else LINEAR for index in range(depth)]

    def latent(self, values):
        return dataclasses.replace(super().latent(values), gate="headwise")

    def latent_positions(self, values):
        return read_latent_rope(values, interleaved=True, default_theta=6_000_000.0)

    def delta(self, values):
        safe = values("kda_safe_gate", bool, True)
        bound = values("kda_lower_bound", float, -5.0)
        return KDAConfig(
            num_heads=values("linear_num_heads", int, values("num_attention_heads", int)),
            head_dim=values("linear_head_dim", int, values("head_dim", int, 128)),
            conv_size=values("linear_conv_kernel_dim", int, values("short_conv_kernel_size", int, 4)),
            full_rank=True,
            lower_bound=bound if safe else None,
            gate_bias=False,
            norm_eps=values("rms_norm_eps", float, self.default_eps),
        )

    def mixer_values(self, model):
        found, delta = {**super().mixer_values(model)}, self.delta_of(model)
        del found["linear_attn_config"]
        bound = {} if delta.lower_bound is None else {"kda_lower_bound": delta.lower_bound}
        positions = next(mixer.positions for mixer in model.layer_mixers if isinstance(mixer, MLAConfig))
        return {
            **found,
            **bound,
            "kda_safe_gate": delta.lower_bound is not None,
            "short_conv_kernel_size": delta.conv_size,
            "rope_parameters": write_latent_rope(positions, interleaved=True),
        }

    def mixer_lines(self, mixer, width, layer):
        yield from super().mixer_lines(mixer, width, layer)
        if isinstance(mixer, MLAConfig):
            yield from layer.dense(f"{self.mixer_name}.g_proj", "mixer.gate")

    def gate_lines(self, layer):
        yield from layer.dense(f"{self.mixer_name}.f_proj", "mixer.f")
        yield from layer.dense(f"{self.mixer_name}.g_proj", "mixer.gate")
        yield layer.same(f"{self.mixer_name}.A_log", "mixer.A_log", float32=True)
