"""Gated DeltaNet, as flash-linear-attention writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from plait.models.hf.base import Layer, Line, register
from plait.models.hf.fla import FLA
from plait.models.mixers.heads import expansion
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig


@register("gated_deltanet", source="Gated Delta Networks (2412.06464)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNet(FLA):
    """See `FLA`."""

    architecture = "GatedDeltaNetForCausalLM"
    mixers = ("gated_deltanet", "softmax")
    mixer_type = GatedDeltaNetConfig
    convolved = "qkv"
    gate_key: ClassVar[str] = "use_gate"

    def linear(self, values, width):
        values.only("output_gate_activation", "swish", "silu")
        heads, head_dim = values("num_heads", int, 6), values("head_dim", int, 256)
        conv_size = values("conv_size", int, 4)
        return GatedDeltaNetConfig(
            num_heads=heads,
            num_v_heads=values("num_v_heads", int, heads),
            head_dim=head_dim,
            expand_v=expansion(round(head_dim * values("expand_v", float, 2.0)), head_dim),
            conv_size=conv_size if values("use_short_conv", bool, True) else None,
            gate=values(self.gate_key, bool, True),
            negative_eigenvalues=values("allow_neg_eigval", bool, False),
            norm_eps=values("norm_eps", float, 1e-6),
        )

    def linear_values(self, mixer, width):
        heads, v_heads = mixer.heads(width)
        return {
            "num_heads": heads,
            "num_v_heads": v_heads,
            "head_dim": mixer.head_dim,
            "expand_v": mixer.expand_v,
            "use_short_conv": mixer.conv_size is not None,
            **({} if mixer.conv_size is None else {"conv_size": mixer.conv_size}),
            self.gate_key: mixer.gate,
            "allow_neg_eigval": mixer.negative_eigenvalues,
        }

    def linear_lines(self, mixer, layer):
        for name in "qkvbo":
            yield from layer.dense(f"attn.{name}_proj", f"mixer.{name}")
        yield from self.gate_lines(mixer, layer)

    def gate_lines(self, mixer: GatedDeltaNetConfig, layer: Layer, *, decay: bool = True) -> Iterator[Line]:
        """Those of decay, output gate and norm."""
        if decay:
            yield from layer.dense("attn.a_proj", "mixer.a")
            for name in ("A_log", "dt_bias"):
                yield layer.same(f"attn.{name}", f"mixer.{name}", float32=True)
        if mixer.gate:
            yield from layer.dense("attn.g_proj", "mixer.gate")
        yield layer.same("attn.o_norm.weight", "mixer.norm.scale")
