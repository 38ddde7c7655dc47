"""Doge: attention under masks that it makes of its values, and gains of the stream before a half of a block is added to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType as Fixed
from typing import Any

from plait.models.config import LMConfig
from plait.models.hf.base import Layer, Line, Unfit, register
from plait.models.hf.decoder import Decoder
from plait.models.hf.rope import read_rope, write_rope
from plait.models.hf.values import Values
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.sparse.dma import DMAConfig

OF_EXPERTS = ("num_experts", "num_experts_per_tok", "norm_topk_prob", "output_router_logits", "router_aux_loss_coef")
"""Fields that say something with `is_moe` alone."""


@register("doge", source="Doge: Trainable Dynamic Mask Sparse Attention (2508.02124)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Doge(Decoder):
    """Norms of queries and keys have the epsilon of the others. Mixtures of experts are refused: their router there mixes the tokens of a
    batch, so that a token's output depends on later ones."""

    architecture = "DogeForCausalLM"
    mixers = ("dma",)
    block = Fixed({**Decoder.block, "input_residual": "mixer_gain", "post_attention_residual": "channel_gain"})

    def stream(self, values, width):
        if values("is_moe", bool, False):
            raise Unfit(
                "config.json: is_moe=True has cross-domain experts, which wait for a channel mixer that retrieves experts by product keys; "
                "models without them can be used"
            )
        values.passed_over(OF_EXPERTS)
        return {"stream_gains": True}

    def layers(self, values: Values, depth: int, width: int) -> Sequence[MixerConfig]:
        heads = values("num_attention_heads", int)
        for name, allowed in (("attention_bias", (False,)), ("sliding_window", ())):
            values.only(name, *allowed)
        mixer = DMAConfig(
            num_heads=heads,
            num_kv_heads=values("num_key_value_heads", int, heads),
            head_dim=values("head_dim", int, width // heads),
            top_k=values("keep_window_size", int, 2048),
            bias="exp",
            qk_norm_eps=values(self.eps_key, float, self.default_eps),
            positions=read_rope(values, max_len=values("max_position_embeddings", int, 2048)),
        )
        return [mixer] * depth

    def mixer_values(self, model: LMConfig) -> Mapping[str, Any]:
        mixer = model.layer_mixers[0]
        if not isinstance(mixer, DMAConfig):
            raise Unfit(f"mixers.{model.layers[0]} is {mixer.name}, not dma")
        heads, kv_heads = mixer.heads(model.d_model)
        return {
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": mixer.head_dim,
            "keep_window_size": mixer.top_k,
            "rope_parameters": write_rope(mixer.positions),
        }

    def mixer_lines(self, mixer: MixerConfig, width: int, layer: Layer) -> Iterator[Line]:
        for name in "qkvo":
            yield from layer.dense(self.attention_names[name], f"mixer.{name}")
        for name in ("q_norm", "k_norm"):
            yield layer.same(f"{self.attention_names[name]}.weight", f"mixer.{name}.scale")
        yield from layer.dense("self_attn.dt_proj", "mixer.d")
        yield layer.same("self_attn.A", "mixer.a")
