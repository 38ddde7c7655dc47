"""OPT: learned positions behind two rows that no token has, layer norms, plain MLPs."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.channel_mixers.mlp import MLPConfig
from plait.models.config import LMConfig
from plait.models.hf.base import Family, Unfit, register
from plait.models.hf.decoder import read_activation, write_activation
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.positions.learned import LearnedConfig

PADDING = 2
"""Rows of the table of positions that are of padding."""


@register("opt", source="OPT (2205.01068)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class OPT(Family):
    """Norms come first; OPT-350m has them last and an embedding of another width, and is refused."""

    architecture = "OPTForCausalLM"
    base = "model.decoder."
    around = Fixed(
        {
            "embed_tokens.weight": "embedding",
            "embed_positions.weight": "positions.table",
            "final_layer_norm.weight": "norm.scale",
            "final_layer_norm.bias": "norm.bias",
        }
    )

    def model(self, values):
        width, heads = values("hidden_size", int), values("num_attention_heads", int)
        values.passed_over(("dropout", "activation_dropout", "layerdrop", "init_std", "prefix"))
        values.only("do_layer_norm_before", True)
        values.only("_remove_final_layer_norm", False)
        values.only("word_embed_proj_dim", width)
        values.only("layer_norm_elementwise_affine", True)
        bias = values("enable_bias", bool, True)
        softmax = SoftmaxConfig(
            num_heads=heads, num_kv_heads=heads, head_dim=width // heads, positions=None, qkv_bias=bias, o_bias=bias
        )
        return LMConfig(
            d_model=width,
            num_layers=values("num_hidden_layers", int),
            pattern="softmax",
            mixers={"softmax": softmax},
            channel_mixer=MLPConfig(
                hidden_dim=values("ffn_dim", int),
                activation=read_activation(values, "activation_function", "relu"),
                use_bias=bias,
            ),
            positions=LearnedConfig(max_len=values("max_position_embeddings", int, 2048), offset=PADDING),
            vocab_size=values("vocab_size", int),
            tie_embeddings=values("tie_word_embeddings", bool, True),
            norm_kind="layer",
            norm_eps=1e-5,
        )

    def values(self, model):
        mixer, mlp, positions = model.layer_mixers[0], model.channel_mixer, model.positions
        if not (isinstance(mixer, SoftmaxConfig) and isinstance(mlp, MLPConfig) and isinstance(positions, LearnedConfig)):
            raise Unfit("an OPT has softmax attention, a plain MLP and learned positions")
        return {
            "vocab_size": model.vocab_size,
            "hidden_size": model.d_model,
            "word_embed_proj_dim": model.d_model,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": mixer.heads(model.d_model)[0],
            "ffn_dim": mlp.width(model.d_model),
            "max_position_embeddings": positions.max_len,
            "activation_function": write_activation(mlp.activation),
            "enable_bias": mlp.use_bias,
            "tie_word_embeddings": model.tie_embeddings,
        }

    def layer(self, model, index, layer):
        mixer, mlp = model.layer_mixers[index], model.channel_mixer
        for name in "qkv":
            yield from layer.dense(f"self_attn.{name}_proj", f"mixer.{name}", bias=mixer.qkv_bias)
        yield from layer.dense("self_attn.out_proj", "mixer.o", bias=mixer.o_bias)
        yield from layer.dense("fc1", "channel_mixer.up", bias=mlp.use_bias)
        yield from layer.dense("fc2", "channel_mixer.down", bias=mlp.use_bias)
        yield from layer.norm("self_attn_layer_norm", "mixer_norm")
        yield from layer.norm("final_layer_norm", "channel_norm")
