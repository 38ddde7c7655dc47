"""Falcon Mamba: Mamba with norms, without scales, of B, C and the time step."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import register
from plait.models.hf.mamba import Mamba
from plait.models.hf.ssm import first_of
from plait.models.mixers.linear.mamba1 import Mamba1Config


@register("falcon_mamba", source="Falcon Mamba (2410.05355)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FalconMamba(Mamba):
    """See `SSMStack`."""

    architecture = "FalconMambaForCausalLM"
    mixers = ("mamba1",)

    def mixer(self, values, width, eps):
        values.passed_over(("use_falcon_mambapy",))
        return dataclasses.replace(super().mixer(values, width, eps), norm_eps=values("mixer_rms_eps", float, 1e-6))

    def mixer_values(self, model):
        return {**super().mixer_values(model), "mixer_rms_eps": first_of(model, Mamba1Config).norm_eps}
