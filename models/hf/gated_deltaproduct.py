"""Gated DeltaProduct, as flash-linear-attention writes it."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import register
from plait.models.hf.gated_deltanet import GatedDeltaNet
from plait.models.hf.transforms import Alternated, AlternatedTaps
from plait.models.mixers.linear.gated_deltaproduct import GatedDeltaProductConfig


@register("gated_deltaproduct", source="DeltaProduct (2502.10297)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaProduct(GatedDeltaNet):
    """See `FLA`. The steps of a token are the outermost axis of its keys, values and strengths there, and here the heads."""

    architecture = "GatedDeltaProductForCausalLM"
    mixers = ("gated_deltaproduct", "softmax")
    mixer_type = GatedDeltaProductConfig
    convolved = "q"
    gate_key = "use_output_gate"

    def linear(self, values, width):
        values.only("num_v_heads", values("num_heads", int, 6))
        shared = super().linear(values, width)
        return GatedDeltaProductConfig(
            **{field.name: getattr(shared, field.name) for field in dataclasses.fields(shared)},
            num_householder=values("num_householder", int, 1),
            decay=values("use_forget_gate", bool, False),
        )

    def linear_values(self, mixer, width):
        steps = {"num_householder": mixer.num_householder, "use_forget_gate": mixer.decay}
        return {**super().linear_values(mixer, width), **steps}

    def mixer_lines(self, mixer, width, layer):
        yield from super().mixer_lines(mixer, width, layer)
        if not isinstance(mixer, GatedDeltaProductConfig):
            return
        heads, v_heads = mixer.heads(width)
        for name, number in {"k": heads, "v": v_heads, "b": v_heads}.items():
            runs = {"heads": number, "runs": mixer.num_householder}
            yield layer.line(f"attn.{name}_proj.weight", f"mixer.{name}.kernel", Alternated(**runs))
            if name != "b" and mixer.conv_size is not None:
                yield layer.line(f"attn.{name}_conv1d.weight", f"mixer.{name}_conv.weight", AlternatedTaps(**runs))

    def linear_lines(self, mixer, layer):
        for name in "qo":
            yield from layer.dense(f"attn.{name}_proj", f"mixer.{name}")
        yield from self.gate_lines(mixer, layer, decay=mixer.decay)
