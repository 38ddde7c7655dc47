"""Falcon-H1: attention and Mamba-2 read the same stream in every layer, with fixed multipliers of most products."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import MappingProxyType as Fixed
from typing import Any

from plait.models.hf.base import Line, Unfit, register
from plait.models.hf.decoder import Decoder
from plait.models.hf.ssm import mamba2_lines, read_mamba2, write_mamba2
from plait.models.hf.values import Values, quotient, written
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.mamba2 import Mamba2Config
from plait.models.mixers.parallel.parallel import ParallelConfig

ONE = Fixed({"mlp_multipliers": (1.0, 1.0), "ssm_multipliers": (1.0,) * 5})
"""Multipliers that change nothing."""


def _multipliers(values: Values, key: str) -> Any:
    """Those of a field; None where they change nothing."""
    given = tuple(float(factor) for factor in values(key, list, list(ONE[key])))
    return None if given == ONE[key] else given


@register("falcon_h1", source="Falcon-H1 (2507.22448)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FalconH1(Decoder):
    """See `Decoder`. What multiplies the keys is part of the scale here."""

    architecture = "FalconH1ForCausalLM"
    mixers = ("parallel",)
    around = Fixed({"embed_tokens.weight": "embedding", "final_layernorm.weight": "norm.scale"})
    default_eps = 1e-5
    block = Fixed({"input_layernorm.weight": "mixer_norm.scale", "pre_ff_layernorm.weight": "channel_norm.scale"})
    mlp_names = Fixed({name: f"feed_forward.{name}_proj" for name in ("gate", "up", "down")})

    def stream(self, values, width):
        values.passed_over(("num_logits_to_keep", "mlp_expansion_factor"))
        values.only("mamba_use_mlp", True)
        values.only("attn_layer_indices")
        return {"embedding_scale": values.factor("embedding_multiplier"), "logit_scale": values.factor("lm_head_multiplier")}

    def layers(self, values, depth, width):
        attention = dataclasses.replace(self.attention(values, width), positions=self.positions(values, None))
        read, given = ("attention_in", "ssm_in"), ("attention_out", "ssm_out")
        factors = lambda names: tuple(values(f"{name}_multiplier", float, 1.0) for name in names)
        kind = "before_gate" if values("mamba_norm_before_gate", bool, True) else "after_gate"
        values.only("projectors_bias", values("mamba_proj_bias", bool, False))
        mamba = read_mamba2(
            values,
            width,
            inner=values("mamba_d_ssm", int, None),
            norm=kind if values("mamba_rms_norm", bool, False) else None,
            norm_eps=values("rms_norm_eps", float, 1e-5),
            multipliers=_multipliers(values, "ssm_multipliers"),
        )
        mixer = ParallelConfig(
            parts=(attention, mamba),
            join="sum",
            norm=None,
            in_multipliers=factors(read),
            out_multipliers=factors(given),
        )
        return [mixer] * depth

    def attention(self, values, width):
        found = super().attention(values, width)
        factor = values.factor("key_multiplier")
        return found if factor is None else dataclasses.replace(found, scale=factor * found.head_dim**-0.5)

    def channel_mixer(self, values):
        return dataclasses.replace(super().channel_mixer(values), multipliers=_multipliers(values, "mlp_multipliers"))

    def softmax_layers(self, model):
        for name, mixer in model.mixers.items():
            if not isinstance(mixer, ParallelConfig) or [type(part) for part in mixer.parts] != [SoftmaxConfig, Mamba2Config]:
                raise Unfit(f"mixers.{name} is no softmax and mamba2 in parallel")
        return [mixer.parts[0] for mixer in model.layer_mixers]

    def own_values(self, model, mixers):
        mixer = model.layer_mixers[0]
        attention, mamba = mixer.parts
        (attention_in, ssm_in), (attention_out, ssm_out) = (
            factors or (1.0, 1.0) for factors in (mixer.in_multipliers, mixer.out_multipliers)
        )
        return {
            **super().own_values(model, mixers),
            **write_mamba2(mamba, model.d_model),
            "mamba_d_ssm": mamba.num_heads(model.d_model) * mamba.head_dim,
            "mamba_rms_norm": mamba.norm is not None,
            **({} if mamba.norm is None else {"mamba_norm_before_gate": mamba.norm == "before_gate"}),
            "projectors_bias": mamba.use_bias,
            "ssm_multipliers": list(mamba.multipliers or ONE["ssm_multipliers"]),
            "mlp_multipliers": list(model.channel_mixer.multipliers or ONE["mlp_multipliers"]),
            "key_multiplier": 1.0 if attention.scale is None else quotient(attention.scale, attention.head_dim**-0.5),
            "attention_in_multiplier": attention_in,
            "attention_out_multiplier": attention_out,
            "ssm_in_multiplier": ssm_in,
            "ssm_out_multiplier": ssm_out,
            "embedding_multiplier": written(model.embedding_scale),
            "lm_head_multiplier": written(model.logit_scale),
        }

    def mixer_lines(self, mixer, width, layer):
        attention, mamba = mixer.parts
        yield from _of_part(0, super().mixer_lines(attention, width, layer))
        yield from _of_part(1, mamba2_lines(layer, "mamba", mamba, width))


def _of_part(number: int, lines: Iterator[Line]) -> Iterator[Line]:
    """Lines of a mixer, as those of a part of one."""
    for line in lines:
        places = [
            dataclasses.replace(place, path=place.path.replace(".mixer.", f".mixer.parts.{number}.")) for place in line.places
        ]
        yield dataclasses.replace(line, places=tuple(places))
