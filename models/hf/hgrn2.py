"""HGRN2, as flash-linear-attention writes it."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import Line, Unfit, register
from plait.models.hf.fla import FLA
from plait.models.hf.places import Place
from plait.models.hf.transforms import Same
from plait.models.mixers.linear.hgrn2 import BOUNDS, HGRN2Config


@register("hgrn2", source="HGRN2 (2404.07904)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HGRN2(FLA):
    """See `FLA`. The norm of the heads adds 1e-5 there, whatever `norm_eps` says."""

    architecture = "HGRN2ForCausalLM"
    mixers = ("hgrn2", "softmax")
    mixer_type = HGRN2Config
    convolved = "qfi"

    def linear(self, values, width):
        heads = values("num_heads", int, None)  # follows from the expansion where there is one
        head_dim = values.or_null("expand_ratio", int, 128) or width // (heads or 1)
        conv_size = values("conv_size", int, 4)
        return HGRN2Config(
            head_dim=head_dim,
            lower_bounds="model" if values("use_lower_bound", bool, True) else None,
            conv_size=conv_size if values("use_short_conv", bool, False) else None,
        )

    def linear_values(self, mixer, width):
        if mixer.lower_bounds == "layer":
            raise Unfit(
                "lower_bounds='layer' of hgrn2 are each layer's own; those of the family are of one softmax, lower_bounds='model'"
            )
        return {
            "num_heads": width // mixer.head_dim,
            "expand_ratio": mixer.head_dim,
            "use_lower_bound": mixer.lower_bounds is not None,
            "use_short_conv": mixer.conv_size is not None,
            **({} if mixer.conv_size is None else {"conv_size": mixer.conv_size}),
        }

    def outside(self, model):
        yield from super().outside(model)
        if model.shared:
            yield Line((f"{self.base}lower_bounds",), (Place(f"shared.{BOUNDS}.scores"),), Same(), float32=True)

    def linear_lines(self, mixer, layer):
        for name in "qfio":
            yield from layer.dense(f"attn.{name}_proj", f"mixer.{name}")
        yield layer.same("attn.g_norm.weight", "mixer.norm.scale")
