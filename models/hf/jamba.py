"""Jamba: Mamba with norms of B, C and the time step, attention without positions between its layers, experts in every other layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import MappingProxyType as Fixed

from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.hf.base import Unfit, register
from plait.models.hf.decoder import Decoder
from plait.models.hf.experts import Experts, Key
from plait.models.hf.hybrid import Hybrid
from plait.models.hf.ssm import KEYS, first_of, mamba1_lines, read_mamba1, write_mamba1
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.mamba1 import Mamba1Config

PARTS = ("gate", "up", "down")


@register("jamba", source="Jamba (2403.19887); Jamba-1.5 (2408.12570)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Jamba(Hybrid, Experts):
    """See `Decoder`. Layers of a kind are those of a period at an offset."""

    architecture = "JambaForCausalLM"
    mixers = ("mamba1", "softmax")
    around = Fixed({"embed_tokens.weight": "embedding", "final_layernorm.weight": "norm.scale"})
    block = Fixed({"input_layernorm.weight": "mixer_norm.scale", "pre_ff_layernorm.weight": "channel_norm.scale"})
    keys = Fixed(
        {
            "num_experts": Key("num_experts", 16),
            "top_k": Key("num_experts_per_tok", 2),
            "hidden_dim": Key("intermediate_size", 14336),
        }
    )
    options = Fixed({"normalize": False})
    mlp_names = Fixed({part: f"feed_forward.{part}_proj" for part in PARTS})
    expert_names = Fixed({"router": "feed_forward.router", **{part: f"feed_forward.experts.{{}}.{part}_proj" for part in PARTS}})

    def stream(self, values, width):
        values.passed_over(("num_logits_to_keep", "calc_logits_for_entire_prompt", "n_ctx"))
        values.only("mamba_inner_layernorms", True)
        return {}

    def attends(self, values, depth):
        period, offset = values("attn_layer_period", int, 8), values("attn_layer_offset", int, 4)
        return [index % period == offset for index in range(depth)]

    def positions(self, values, window):
        return None

    def rope(self, mixers):
        return None

    def linear(self, values, width):
        return read_mamba1(values, width, KEYS, norm_eps=values("rms_norm_eps", float, 1e-6), norm_scale=True)

    def channel_mixers(self, values, depth):
        if values("num_experts", int, 16) > 1:
            return super().channel_mixers(values, depth)
        values.passed_over(("num_experts_per_tok", "output_router_logits", "router_aux_loss_coef"))
        values.passed_over(("expert_layer_period", "expert_layer_offset"))
        return [self.channel_mixer(values)] * depth

    def dense(self, values, depth):
        period, offset = values("expert_layer_period", int, 2), values("expert_layer_offset", int, 1)
        return [index % period != offset for index in range(depth)]

    def dense_values(self, dense):
        period, offset = _period([not alone for alone in dense])
        return {"expert_layer_period": period, "expert_layer_offset": offset}

    def channel_values(self, model):
        if isinstance(model.channel_mixer, GatedMLPConfig) and not model.channel_mixers:
            return {**Decoder.channel_values(self, model), "num_experts": 1}
        return super().channel_values(model)

    def own_values(self, model, mixers):
        period, offset = _period([isinstance(mixer, SoftmaxConfig) for mixer in model.layer_mixers])
        return {
            "attn_layer_period": period,
            "attn_layer_offset": offset,
            **write_mamba1(first_of(model, Mamba1Config), model.d_model, KEYS),
        }

    def mixer_lines(self, mixer, width, layer):
        if isinstance(mixer, Mamba1Config):
            yield from mamba1_lines(layer, "mamba", mixer, width)
        else:
            yield from super().mixer_lines(mixer, width, layer)


def _period(chosen: Sequence[bool]) -> tuple[int, int]:
    """After how many layers one is chosen, and the first that is. Raises Unfit where they are not at equal distances."""
    numbers = [index for index, is_chosen in enumerate(chosen) if is_chosen]
    period = numbers[1] - numbers[0] if len(numbers) > 1 else len(chosen)
    if numbers != list(range(numbers[0] % period, len(chosen), period)):
        raise Unfit(f"layers {numbers} are at no equal distances")
    return period, numbers[0]
