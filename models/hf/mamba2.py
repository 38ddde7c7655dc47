"""Mamba-2."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import register
from plait.models.hf.ssm import SHORT_KEYS, first_of, mamba2_lines, read_mamba2, whole_expand, write_mamba2
from plait.models.hf.ssm_stack import SSMStack
from plait.models.mixers.linear.mamba2 import Mamba2Config


@register("mamba2", source="Transformers are SSMs (2405.21060)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2(SSMStack):
    """See `SSMStack`."""

    architecture = "Mamba2ForCausalLM"
    mixers = ("mamba2",)
    ties = False

    def mixer(self, values, width, eps):
        values.passed_over(("time_step_rank", "norm_before_gate"))  # the norm is after the gate whatever is said
        values.only("rms_norm", True)
        mixer = read_mamba2(values, width, SHORT_KEYS, norm_eps=eps)
        values.only("intermediate_size", mixer.num_heads(width) * mixer.head_dim)
        return mixer

    def mixer_values(self, model):
        mixer = first_of(model, Mamba2Config)
        return {**write_mamba2(mixer, model.d_model, SHORT_KEYS), "expand": whole_expand(mixer.expand)}

    def layer(self, model, index, layer):
        yield layer.same("norm.weight", "mixer_norm.scale")
        yield from mamba2_lines(layer, "mixer", model.layer_mixers[index], model.d_model)
