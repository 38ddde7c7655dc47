"""DeltaNet, as flash-linear-attention writes it."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import Unfit, register
from plait.models.hf.fla import FLA
from plait.models.mixers.linear.deltanet import DeltaNetConfig


@register("delta_net", source="DeltaNet (2406.06484)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNet(FLA):
    """See `FLA`."""

    architecture = "DeltaNetForCausalLM"
    mixers = ("deltanet", "softmax")
    mixer_type = DeltaNetConfig
    convolved = "qkv"

    def linear(self, values, width):
        values.only("use_beta", True)
        values.only("use_output_norm", True)
        values.only("qk_norm", "l2")
        values.only("qk_activation", "silu")
        heads, expand = values("num_heads", int, 16), values("expand_k", float, 1.0)
        if values("expand_v", float, 1.0) != expand:
            raise Unfit("config.json: expand_k and expand_v differ, and heads of keys and values are of one width here")
        conv_size = values("conv_size", int, 4)
        return DeltaNetConfig(
            num_heads=heads,
            head_dim=round(width * expand) // heads,
            conv_size=conv_size if values("use_short_conv", bool, True) else None,
            gate=values("use_gate", bool, False),
            negative_eigenvalues=values("allow_neg_eigval", bool, False),
            norm_eps=values("norm_eps", float, 1e-6),
        )

    def linear_values(self, mixer, width):
        expand = mixer.heads(width) * mixer.head_dim / width
        return {
            "num_heads": mixer.heads(width),
            "expand_k": expand,
            "expand_v": expand,
            "use_short_conv": mixer.conv_size is not None,
            **({} if mixer.conv_size is None else {"conv_size": mixer.conv_size}),
            "use_gate": mixer.gate,
            "allow_neg_eigval": mixer.negative_eigenvalues,
        }

    def linear_lines(self, mixer, layer):
        for name in "qkvbo":
            yield from layer.dense(f"attn.{name}_proj", f"mixer.{name}")
        if mixer.gate:
            yield from layer.dense("attn.g_proj", "mixer.gate")
        yield layer.same("attn.o_norm.weight", "mixer.norm.scale")
