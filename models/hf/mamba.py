"""Mamba."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import register
from plait.models.hf.ssm import first_of, mamba1_lines, read_mamba1, write_mamba1
from plait.models.hf.ssm_stack import SSMStack
from plait.models.mixers.linear.mamba1 import Mamba1Config


@register("mamba", source="Mamba (2312.00752)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba(SSMStack):
    """See `SSMStack`. Older files have some sizes a second time, by the names of the first code, and an inner width that need not be
    `expand` times the other."""

    architecture = "MambaForCausalLM"
    mixers = ("mamba1",)
    ties = True

    def mixer(self, values, width, eps):
        mixer = read_mamba1(values, width, inner=values("intermediate_size", int, None))
        values.only("d_model", width)
        values.only("n_layer", values("num_hidden_layers", int))
        values.only("rms_norm", True)
        values.only("d_inner", mixer.width(width))
        values.passed_over(("fused_add_norm", "pad_vocab_size_multiple"))
        return mixer

    def mixer_values(self, model):
        mixer = first_of(model, Mamba1Config)
        return {**write_mamba1(mixer, model.d_model), "intermediate_size": mixer.width(model.d_model)}

    def layer(self, model, index, layer):
        yield layer.same("norm.weight", "mixer_norm.scale")
        yield from mamba1_lines(layer, "mixer", model.layer_mixers[index], model.d_model)
