"""OLMo Hybrid: OLMo 3 in which three of four layers are Gated DeltaNet with norms before, and attention knows no positions."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.hf.base import Unfit, register
from plait.models.hf.decoder import Decoder
from plait.models.hf.delta_hybrid import DeltaHybrid
from plait.models.hf.olmo2 import OLMo2
from plait.models.hf.rope import read_rope, write_rope
from plait.models.hf.transforms import Taps
from plait.models.mixers.heads import expansion
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig


@register("olmo_hybrid", source="OLMo Hybrid (Ai2, 2026)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class OLMoHybrid(DeltaHybrid, OLMo2):
    """See `Decoder`. What transformers 5.24 saves has other names of norms than the published model, and convolutions of wrong shapes
    where keys and values are not of one width; what it loads is right."""

    architecture = "OlmoHybridForCausalLM"
    mixers = ("gated_deltanet", "softmax")
    renamed = Fixed({"attention_layer_norm": "input_layernorm", "feedforward_layer_norm": "post_attention_layernorm"})

    def stream(self, values, width):
        return {"norm": "output", "norms": {GatedDeltaNetConfig.name: "pre"}}

    def norms(self, mixer):
        return Decoder.block if isinstance(mixer, GatedDeltaNetConfig) else self.block

    def positions(self, values, window):
        given = values("rope_parameters", dict, {}) or {"rope_theta": values("rope_theta", float, 0.0)}
        if given.get("rope_theta", 0.0) is None:
            return None
        if not given.get("rope_theta"):  # which the published model means as none, and transformers reads as 10,000
            raise Unfit('config.json: rope_parameters has no rope_theta; say {"rope_theta": null} for no positions, or the base')
        return read_rope(values, max_len=values("max_position_embeddings", int, 65536))

    def rope(self, mixers):
        positions = mixers[0].positions
        return {"rope_theta": None, "rope_type": "default"} if positions is None else write_rope(positions)

    def linear(self, values, width):
        values.passed_over(f"linear_{name}" for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor"))
        heads = values("num_attention_heads", int)
        keys = values("linear_num_key_heads", int, heads)
        key_dim = values("linear_key_head_dim", int, 3 * width // (4 * keys))
        return GatedDeltaNetConfig(
            num_heads=keys,
            num_v_heads=values("linear_num_value_heads", int, heads),
            head_dim=key_dim,
            expand_v=expansion(values("linear_value_head_dim", int, 2 * key_dim), key_dim),
            conv_size=values("linear_conv_kernel_dim", int, 4),
            negative_eigenvalues=values("linear_allow_neg_eigval", bool, True),
        )

    def own_values(self, model, mixers):
        found = super().own_values(model, mixers)
        linear = next(mixer for mixer in model.layer_mixers if isinstance(mixer, GatedDeltaNetConfig))
        return {**found, "linear_allow_neg_eigval": linear.negative_eigenvalues}

    def linear_lines(self, mixer, width, layer):
        for name in "qkvabgo":
            yield from layer.dense(f"linear_attn.{name}_proj", f"mixer.{'gate' if name == 'g' else name}")
        for name in "qkv":
            yield layer.line(f"linear_attn.{name}_conv1d.weight", f"mixer.{name}_conv.weight", Taps())
        yield layer.same("linear_attn.o_norm.weight", "mixer.norm.scale")
