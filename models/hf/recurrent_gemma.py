"""RecurrentGemma: RG-LRU with local attention, half of each head turned, between its layers; norms of 1 + weight."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

import jax.numpy as jnp

from plait.models.hf.base import Unfit, register
from plait.models.hf.hybrid import Hybrid
from plait.models.hf.rope import read_rope, write_rope
from plait.models.hf.ssm import first_of
from plait.models.hf.transforms import Taps
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.heads import expansion
from plait.models.mixers.linear.rg_lru import RGLRUConfig

RECURRENT, ATTENTION = "recurrent", "attention"


@register("recurrent_gemma", source="RecurrentGemma (2404.07839); Griffin (2402.19427)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentGemma(Hybrid):
    """See `Decoder`. The width in the config is twice that of the MLP; the scale of the embedding is rounded to bfloat16."""

    architecture = "RecurrentGemmaForCausalLM"
    mixers = ("rg_lru", "softmax")
    ties = True
    activation_key, default_activation = "hidden_activation", "gelu_pytorch_tanh"
    around = Fixed({"embed_tokens.weight": "embedding", "final_norm.weight": "norm.scale"})
    block = Fixed({"temporal_pre_norm.weight": "mixer_norm.scale", "channel_pre_norm.weight": "channel_norm.scale"})
    attention_names = Fixed({name: f"temporal_block.{name}_proj" for name in "qkvo"})
    mlp_names = Fixed({name: f"mlp_block.{name}_proj" for name in ("gate", "up", "down")})
    stale = ("_block_types",)

    def stream(self, values, width):
        values.only("embeddings_scale_by_sqrt_dim", True)
        values.passed_over(("w_init_variance_scale", "final_w_init_variance_scale"))
        return {
            "norm_kind": "rms_1p",
            "embedding_scale": float(jnp.bfloat16(width**0.5)),
            "logit_soft_cap": values("logits_soft_cap", float, 30.0),
        }

    def attends(self, values, depth):
        default = [RECURRENT, RECURRENT, ATTENTION]
        words = values("block_types", list, values("_block_types", list, default))
        if not words or not {*words} <= {RECURRENT, ATTENTION}:
            raise Unfit(f"config.json: block_types={words!r} must be a list of {RECURRENT!r} and {ATTENTION!r}")
        return [words[index % len(words)] == ATTENTION for index in range(depth)]

    def attention(self, values, width):
        window = values("attention_window_size", int, 2048)
        return dataclasses.replace(super().attention(values, width), window_size=window, o_bias=True)

    def positions(self, values, window):
        return read_rope(values, max_len=values("max_position_embeddings", int, 8192), default_fraction=0.5)

    def rope(self, mixers):
        return {"partial_rotary_factor": 1.0, **write_rope(mixers[0].positions)}

    def linear(self, values, width):
        inner, heads = values("lru_width", int, width), values("num_attention_heads", int)
        return RGLRUConfig(head_dim=inner // heads, expand=expansion(inner, width), conv_size=values("conv1d_width", int, 4))

    def channel_mixer(self, values):
        found = super().channel_mixer(values)
        return dataclasses.replace(found, hidden_dim=values("intermediate_size", int) // 2, use_bias=True)

    def channel_values(self, model):
        found = super().channel_values(model)
        return {**found, "intermediate_size": 2 * found["intermediate_size"]}

    def own_values(self, model, mixers):
        lru = first_of(model, RGLRUConfig)
        heads, head_dim = lru.heads(model.d_model)
        words = [ATTENTION if isinstance(mixer, SoftmaxConfig) else RECURRENT for mixer in model.layer_mixers]
        return {
            **super().own_values(model, mixers),
            "block_types": _repeated(words),
            "attention_window_size": mixers[0].window_size,
            "lru_width": heads * head_dim,
            "conv1d_width": lru.conv_size,
            "logits_soft_cap": model.logit_soft_cap,
        }

    def mixer_lines(self, mixer, width, layer):
        if isinstance(mixer, SoftmaxConfig):
            yield from super().mixer_lines(mixer, width, layer)
            return
        for theirs, ours in {"x": "x", "y": "y", "out": "o"}.items():
            yield from layer.dense(f"temporal_block.linear_{theirs}", f"mixer.{ours}", bias=True)
        yield layer.line("temporal_block.conv_1d.weight", "mixer.conv.weight", Taps())
        yield layer.same("temporal_block.conv_1d.bias", "mixer.conv.bias")
        for theirs, ours in {"input": "input_gate", "recurrent": "decay_gate"}.items():
            yield layer.same(f"temporal_block.rg_lru.{theirs}_gate_weight", f"mixer.{ours}.kernel")
            yield layer.same(f"temporal_block.rg_lru.{theirs}_gate_bias", f"mixer.{ours}.bias")
        yield layer.same("temporal_block.rg_lru.recurrent_param", "mixer.rate", float32=True)


def _repeated(words: list[str]) -> list[str]:
    """The first of them, which repeated give all."""
    lengths = range(1, len(words) + 1)
    return next(words[:n] for n in lengths if all(word == words[i % n] for i, word in enumerate(words)))
