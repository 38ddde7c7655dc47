"""GPT-NeoX and Pythia: attention and MLP beside each other, a quarter of each head turned."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.channel_mixers.mlp import MLPConfig
from plait.models.config import LMConfig
from plait.models.hf.base import Family, Unfit, register
from plait.models.hf.decoder import read_activation, write_activation
from plait.models.hf.rope import read_rope, write_rope
from plait.models.hf.transforms import Fused
from plait.models.mixers.full.softmax import SoftmaxConfig


@register("gpt_neox", source="GPT-NeoX-20B (2204.06745); Pythia (2304.01373)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTNeoX(Family):
    """Queries, keys and values are one tensor, head by head."""

    architecture = "GPTNeoXForCausalLM"
    base = "gpt_neox."
    head = "embed_out.weight"
    around = Fixed(
        {"embed_in.weight": "embedding", "final_layer_norm.weight": "norm.scale", "final_layer_norm.bias": "norm.bias"}
    )
    ignored = (
        "gpt_neox.layers.*.attention.bias",
        "gpt_neox.layers.*.attention.masked_bias",
        "gpt_neox.layers.*.attention.rotary_emb.inv_freq",
    )

    def model(self, values):
        width, heads = values("hidden_size", int), values("num_attention_heads", int)
        values.passed_over(("classifier_dropout",))
        rope = read_rope(
            values,
            max_len=values("max_position_embeddings", int, 2048),
            default_fraction=0.25,
            older={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        )
        bias = values("attention_bias", bool, True)
        softmax = SoftmaxConfig(
            num_heads=heads, num_kv_heads=heads, head_dim=width // heads, positions=rope, qkv_bias=bias, o_bias=bias
        )
        return LMConfig(
            d_model=width,
            num_layers=values("num_hidden_layers", int),
            pattern="softmax",
            mixers={"softmax": softmax},
            channel_mixer=MLPConfig(
                hidden_dim=values("intermediate_size", int), activation=read_activation(values, "hidden_act", "gelu")
            ),
            vocab_size=values("vocab_size", int),
            tie_embeddings=values("tie_word_embeddings", bool, False),
            norm_kind="layer",
            norm_eps=values("layer_norm_eps", float, 1e-5),
            parallel_block=values("use_parallel_residual", bool, True),
        )

    def values(self, model):
        mixer, mlp = model.layer_mixers[0], model.channel_mixer
        if not (isinstance(mixer, SoftmaxConfig) and isinstance(mlp, MLPConfig)):
            raise Unfit("a GPT-NeoX has softmax attention and a plain MLP")
        return {
            "vocab_size": model.vocab_size,
            "hidden_size": model.d_model,
            "intermediate_size": mlp.width(model.d_model),
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": mixer.heads(model.d_model)[0],
            "hidden_act": write_activation(mlp.activation),
            "layer_norm_eps": model.norm_eps,
            "use_parallel_residual": model.parallel_block,
            "tie_word_embeddings": model.tie_embeddings,
            "attention_bias": mixer.qkv_bias,
            "rope_parameters": {"partial_rotary_factor": 1.0, **write_rope(mixer.positions)},
        }

    def layer(self, model, index, layer):
        mixer = model.layer_mixers[index]
        transform = Fused((model.d_model,) * 3, groups=mixer.heads(model.d_model)[0])
        parts = tuple(f"mixer.{name}" for name in "qkv")
        yield from layer.fused("attention.query_key_value", parts, transform, bias=mixer.qkv_bias)
        yield from layer.dense("attention.dense", "mixer.o", bias=mixer.o_bias)
        yield from layer.dense("mlp.dense_h_to_4h", "channel_mixer.up", bias=True)
        yield from layer.dense("mlp.dense_4h_to_h", "channel_mixer.down", bias=True)
        yield from layer.norm("input_layernorm", "mixer_norm")
        yield from layer.norm("post_attention_layernorm", "channel_norm")
