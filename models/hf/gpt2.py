"""GPT-2: learned positions, layer norms, plain MLPs; its linear maps are kept as `[in, out]`."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.channel_mixers.mlp import MLPConfig
from plait.models.config import LMConfig
from plait.models.hf.base import Family, Unfit, register
from plait.models.hf.decoder import read_activation, write_activation
from plait.models.hf.transforms import Fused
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.positions.learned import LearnedConfig


@register("gpt2", source="Language Models are Unsupervised Multitask Learners (OpenAI, 2019)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2(Family):
    """Queries, keys and values of a layer are one tensor."""

    architecture = "GPT2LMHeadModel"
    ignored = ("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias")
    base = "transformer."
    layers_name = "h"
    around = Fixed(
        {"wte.weight": "embedding", "wpe.weight": "positions.table", "ln_f.weight": "norm.scale", "ln_f.bias": "norm.bias"}
    )

    def model(self, values):
        width = values("n_embd", int)
        heads = values("n_head", int)
        values.passed_over(("n_ctx", "attn_pdrop", "embd_pdrop", "resid_pdrop", "reorder_and_upcast_attn"))
        values.passed_over(key for key in values if key.startswith("summary_"))
        values.only("scale_attn_weights", True)
        values.only("scale_attn_by_inverse_layer_idx", False)
        values.only("add_cross_attention", False)
        softmax = SoftmaxConfig(
            num_heads=heads, num_kv_heads=heads, head_dim=width // heads, positions=None, qkv_bias=True, o_bias=True
        )
        activation = read_activation(values, "activation_function", "gelu_new")
        return LMConfig(
            d_model=width,
            num_layers=values("n_layer", int),
            pattern="softmax",
            mixers={"softmax": softmax},
            channel_mixer=MLPConfig(hidden_dim=values("n_inner", int, 4 * width), activation=activation),
            positions=LearnedConfig(max_len=values("n_positions", int, 1024)),
            vocab_size=values("vocab_size", int),
            tie_embeddings=values("tie_word_embeddings", bool, True),
            norm_kind="layer",
            norm_eps=values("layer_norm_epsilon", float, 1e-5),
        )

    def values(self, model):
        mixer, mlp, positions = model.layer_mixers[0], model.channel_mixer, model.positions
        if not (isinstance(mixer, SoftmaxConfig) and isinstance(mlp, MLPConfig) and isinstance(positions, LearnedConfig)):
            raise Unfit("a GPT-2 has softmax attention, a plain MLP and learned positions")
        return {
            "vocab_size": model.vocab_size,
            "n_embd": model.d_model,
            "n_layer": model.num_layers,
            "n_head": mixer.heads(model.d_model)[0],
            "n_inner": mlp.width(model.d_model),
            "n_positions": positions.max_len,
            "activation_function": {"gelu": "gelu_new"}.get(mlp.activation) or write_activation(mlp.activation),
            "layer_norm_epsilon": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
        }

    def layer(self, model, index, layer):
        parts = tuple(f"mixer.{name}" for name in "qkv")
        yield from layer.fused("attn.c_attn", parts, Fused((model.d_model,) * 3, transposed=False), bias=True)
        yield from layer.dense("attn.c_proj", "mixer.o", bias=True, transposed=False)
        yield from layer.dense("mlp.c_fc", "channel_mixer.up", bias=True, transposed=False)
        yield from layer.dense("mlp.c_proj", "channel_mixer.down", bias=True, transposed=False)
        yield from layer.norm("ln_1", "mixer_norm")
        yield from layer.norm("ln_2", "channel_norm")
