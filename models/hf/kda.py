"""Kimi delta attention, as flash-linear-attention writes it."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import register
from plait.models.hf.fla import FLA
from plait.models.mixers.linear.kda import KDAConfig


@register("kda", source="Kimi Linear (2510.26692)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class KDA(FLA):
    """See `FLA`."""

    architecture = "KDAForCausalLM"
    mixers = ("kda", "softmax")
    mixer_type = KDAConfig
    convolved = "qkv"

    def linear(self, values, width):
        heads = values("num_heads", int, 16)
        values.only("num_v_heads", heads)
        values.only("expand_v", 1)
        values.passed_over(("safe_gate",))  # of the kernel: a bound is used where there is one
        conv_size = values("conv_size", int, 4)
        return KDAConfig(
            num_heads=heads,
            head_dim=values("head_dim", int, 128),
            lower_bound=values("lower_bound", float, None),
            conv_size=conv_size if values("use_short_conv", bool, True) else None,
            negative_eigenvalues=values("allow_neg_eigval", bool, False),
            norm_eps=values("norm_eps", float, 1e-6),
        )

    def linear_values(self, mixer, width):
        return {
            "num_heads": mixer.heads(width),
            "head_dim": mixer.head_dim,
            "expand_v": 1.0,
            "safe_gate": mixer.lower_bound is not None,
            "lower_bound": mixer.lower_bound,
            "use_short_conv": mixer.conv_size is not None,
            **({} if mixer.conv_size is None else {"conv_size": mixer.conv_size}),
            "allow_neg_eigval": mixer.negative_eigenvalues,
        }

    def linear_lines(self, mixer, layer):
        for name in "qkvbo":
            yield from layer.dense(f"attn.{name}_proj", f"mixer.{name}")
        for theirs, ours, bias in (("f", "f", False), ("g", "gate", True)):
            yield from layer.dense(f"attn.{theirs}_proj.0", f"mixer.{ours}.down")
            yield from layer.dense(f"attn.{theirs}_proj.1", f"mixer.{ours}.up", bias=bias)
        for name in ("A_log", "dt_bias"):
            yield layer.same(f"attn.{name}", f"mixer.{name}", float32=True)
        yield layer.same("attn.o_norm.weight", "mixer.norm.scale")
