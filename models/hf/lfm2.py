"""LFM2: gated short convolutions with attention between them."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.hf.base import register
from plait.models.hf.hybrid import Hybrid
from plait.models.hf.rope import read_rope
from plait.models.hf.ssm import first_of
from plait.models.hf.transforms import Fused, Taps
from plait.models.hf.windows import FULL, read_layer_types
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gated_conv import GatedConvConfig

CONV = "conv"


@register("lfm2", source="LFM2 Technical Report (2511.23404)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LFM2(Hybrid):
    """See `Decoder`. Older files number the layers of attention, and say of which width that of the MLP is two thirds, rounded up."""

    architecture = "Lfm2ForCausalLM"
    mixers = ("gated_conv", "softmax")
    ties = True
    eps_key, default_eps = "norm_eps", 1e-5
    around = Fixed({"embed_tokens.weight": "embedding", "embedding_norm.weight": "norm.scale"})
    block = Fixed({"operator_norm.weight": "mixer_norm.scale", "ffn_norm.weight": "channel_norm.scale"})
    attention_names = Fixed(
        {
            **Hybrid.attention_names,
            "o": "self_attn.out_proj",
            "q_norm": "self_attn.q_layernorm",
            "k_norm": "self_attn.k_layernorm",
        }
    )
    mlp_names = Fixed({"gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2"})
    stale = ("block_ff_dim", "full_attn_idxs", "tie_embedding")

    def model(self, values):
        found = super().model(values)
        return dataclasses.replace(found, tie_embeddings=values("tie_embedding", bool, found.tie_embeddings))

    def stream(self, values, width):
        values.only("use_pos_enc", True)
        values.only("block_use_swiglu", True)
        for key in ("block_dim", "conv_dim", "conv_dim_out"):
            values.only(key, width)
        values.passed_over(("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init"))
        return {}

    def attends(self, values, depth):
        numbers = values("full_attn_idxs", list, list(range(depth)))
        default = [FULL if index in numbers else CONV for index in range(depth)]
        return [word == FULL for word in read_layer_types(values, depth, default, (FULL, CONV))]

    def attention(self, values, width):
        found = super().attention(values, width)
        values.only("num_heads", found.num_heads)
        values.passed_over(("block_norm_eps",))
        return dataclasses.replace(found, qk_norm=True, qk_norm_eps=values("norm_eps", float, 1e-5))

    def positions(self, values, window):
        return read_rope(values, max_len=values("max_position_embeddings", int, 128_000), default_theta=1e6)

    def linear(self, values, width):
        return GatedConvConfig(conv_size=values("conv_L_cache", int, 3), use_bias=values("conv_bias", bool, False))

    def channel_mixer(self, values):
        older = values("block_ff_dim", int, None)
        inner = values("intermediate_size", int) if older is None else older
        factor, unit = values("block_ffn_dim_multiplier", float, 1.0), values("block_multiple_of", int, 256)
        if values("block_auto_adjust_ff_dim", bool, True):
            inner = -(-int(factor * int(2 * inner / 3)) // unit) * unit
        return GatedMLPConfig(hidden_dim=inner)

    def own_values(self, model, mixers):
        conv = first_of(model, GatedConvConfig)
        return {
            "layer_types": [FULL if isinstance(mixer, SoftmaxConfig) else CONV for mixer in model.layer_mixers],
            "conv_L_cache": conv.conv_size,
            "conv_bias": conv.use_bias,
            "block_auto_adjust_ff_dim": False,
        }

    def mixer_lines(self, mixer, width, layer):
        if isinstance(mixer, SoftmaxConfig):
            yield from super().mixer_lines(mixer, width, layer)
            return
        parts = ("mixer.b", "mixer.c", "mixer.v")
        yield from layer.fused("conv.in_proj", parts, Fused((width,) * 3), bias=mixer.use_bias)
        yield layer.line("conv.conv.weight", "mixer.conv.weight", Taps())
        if mixer.use_bias:
            yield layer.same("conv.conv.bias", "mixer.conv.bias")
        yield from layer.dense("conv.out_proj", "mixer.o", bias=mixer.use_bias)
