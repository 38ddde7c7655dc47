"""Granite 4: Mamba-2 with attention, with or without positions, between its layers, and an MLP beside experts or alone."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.channel_mixers.moe import MoEConfig
from plait.models.hf.base import register
from plait.models.hf.decoder import read_activation, write_activation
from plait.models.hf.experts import Experts, Key
from plait.models.hf.granite import Granite
from plait.models.hf.hybrid import Hybrid
from plait.models.hf.rope import write_rope
from plait.models.hf.ssm import KEYS, mamba2_lines, read_mamba2, whole_expand, write_mamba2
from plait.models.hf.transforms import Fused, Halves, Transposed
from plait.models.hf.windows import FULL, LINEAR, read_layer_types
from plait.models.mixers.linear.mamba2 import Mamba2Config
from plait.models.positions.rotary import RotaryConfig


@register("granitemoehybrid", source="Granite 4.0 (IBM, 2025)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteMoEHybrid(Hybrid, Experts, Granite):
    """See `Decoder`. The experts of a layer are one tensor, as are the two projections that an MLP begins with."""

    architecture = "GraniteMoeHybridForCausalLM"
    mixers = ("mamba2", "softmax")
    keys = Fixed(
        {
            "num_experts": Key("num_local_experts", 8),
            "top_k": Key("num_experts_per_tok", 2),
            "hidden_dim": Key("intermediate_size", 11008),
            "shared_hidden_dim": Key("shared_intermediate_size", 1024),
        }
    )
    options = Fixed({"num_shared_experts": 1})
    expert_names = Fixed({"router": "block_sparse_moe.router.layer"})

    def stream(self, values, width):
        values.only("normalization_function", "rmsnorm")
        values.passed_over(("init_method",))
        return super().stream(values, width)

    def attends(self, values, depth):
        return [word == FULL for word in read_layer_types(values, depth, [LINEAR] * depth, (FULL, LINEAR))]

    def linear(self, values, width):
        return read_mamba2(values, width, norm_eps=values("rms_norm_eps", float, 1e-6))

    def positions(self, values, window):
        found = super().positions(values, window)
        return found if values("position_embedding_type", str, "nope") == "rope" else None

    def rope(self, mixers):
        return write_rope(mixers[0].positions or RotaryConfig())  # which says nothing without positions

    def channel_mixers(self, values, depth):
        if values("num_local_experts", int, 8):
            return super().channel_mixers(values, depth)
        values.passed_over(("num_experts_per_tok", "intermediate_size", "output_router_logits", "router_aux_loss_coef"))
        activation = read_activation(values, self.activation_key, self.default_activation)
        return [GatedMLPConfig(hidden_dim=values("shared_intermediate_size", int, 1024), activation=activation)] * depth

    def dense(self, values, depth):
        return [False] * depth

    def dense_values(self, dense):
        return {}

    def channel_values(self, model):
        mlp = model.channel_mixer
        if not isinstance(mlp, GatedMLPConfig):
            return super().channel_values(model)
        activation = {self.activation_key: write_activation(mlp.activation)}
        return {"num_local_experts": 0, "shared_intermediate_size": mlp.width(model.d_model), **activation}

    def own_values(self, model, mixers):
        mamba = next((mixer for mixer in model.layer_mixers if isinstance(mixer, Mamba2Config)), None)
        return {
            **super().own_values(model, mixers),
            "layer_types": [LINEAR if isinstance(mixer, Mamba2Config) else FULL for mixer in model.layer_mixers],
            "position_embedding_type": "nope" if mixers[0].positions is None else "rope",
            **(
                {KEYS["num_heads"]: 1, KEYS["head_dim"]: "auto", KEYS["state_dim"]: 256, KEYS["num_groups"]: 1}
                if mamba is None
                else {**write_mamba2(mamba, model.d_model), KEYS["expand"]: whole_expand(mamba.expand)}
            ),
        }

    def mixer_lines(self, mixer, width, layer):
        if isinstance(mixer, Mamba2Config):
            yield from mamba2_lines(layer, "mamba", mixer, width)
        else:
            yield from super().mixer_lines(mixer, width, layer)

    def channel_lines(self, mlp, width, layer):
        if isinstance(mlp, MoEConfig):
            yield from layer.dense(self.expert_names["router"], "channel_mixer.router")
            parts = ("channel_mixer.gate.kernel", "channel_mixer.up.kernel")
            yield layer.line("block_sparse_moe.input_linear.weight", parts, Halves())
            yield layer.line("block_sparse_moe.output_linear.weight", "channel_mixer.down.kernel", Transposed())
            path, inner = "channel_mixer.shared", (mlp.shared_width(width),) * 2
        else:
            path, inner = "channel_mixer", (mlp.width(width),) * 2
        yield from layer.fused("shared_mlp.input_linear", (f"{path}.gate", f"{path}.up"), Fused(inner))
        yield from layer.dense("shared_mlp.output_linear", f"{path}.down")
