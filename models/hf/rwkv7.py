"""RWKV-7, as flash-linear-attention writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import MappingProxyType as Fixed

from plait.models.channel_mixers.mlp import MLPConfig
from plait.models.hf.base import Layer, Line, Unfit, register
from plait.models.hf.fla import FLA
from plait.models.hf.places import Place
from plait.models.hf.transforms import Rows, Same, Unused, Widened
from plait.models.mixers.linear.rwkv7 import MIXED, RWKV7Config

RANKS = {"decay_low_rank_dim": 64, "a_low_rank_dim": 64, "v_low_rank_dim": 16, "gate_low_rank_dim": 128}
"""Inner widths of the projections of w, a, v and g, in the order of `RWKV7Config.ranks`."""
FUSED_EPS, EPS = 1e-6, 1e-24
"""What is added to the squared length of removed keys, by whether norms are fused."""


@register("rwkv7", source='RWKV-7 "Goose" (2503.14456)')
@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV7(FLA):
    """See `FLA`. All layers are RWKV-7: its block there does not run with attention. The first has no weights that move values to its own;
    those here are not used."""

    architecture = "RWKV7ForCausalLM"
    mixers = ("rwkv7",)
    mixer_type = RWKV7Config
    default_eps = 1e-5
    around = Fixed({"embeddings.weight": "embedding", "norm.weight": "norm.scale", "norm.bias": "norm.bias"})
    block = Fixed(
        {
            f"{theirs}_norm.{tensor}": f"{ours}_norm.{array}"
            for theirs, ours in (("attn", "mixer"), ("ffn", "channel"))
            for tensor, array in (("weight", "scale"), ("bias", "bias"))
        }
    )
    mlp_names = Fixed({"up": "ffn.key", "down": "ffn.value"})

    one_mix: bool = False
    """Whether the mixes of a layer are one tensor, as in older files."""

    def stream(self, values, width):
        values.only("norm_bias", True)
        return {"norm_kind": "layer", "embedding_norm": values("norm_first", bool, True)}

    def layers(self, values, depth, width):
        values.only("attn")
        values.only("value_dim", width, [width] * depth)
        return super().layers(values, depth, width)

    def linear(self, values, width):
        heads = values("num_heads", int, None)  # follows from the channels of a head where these are given
        head_dim = values.or_null("head_dim", int, 64) or width // (heads or 1)
        w, a, v, g = (values.or_null(name, int, default) for name, default in RANKS.items())
        return RWKV7Config(
            head_dim=head_dim,
            decay_rank=w,
            rate_rank=a,
            value_rank=v,
            gate_rank=g,
            norm_eps=head_dim * values("norm_eps", float, self.default_eps),
            unit_eps=FUSED_EPS if values("fuse_norm", bool, True) else EPS,
        )

    def channel_mixers(self, values, depth):
        values.only("hidden_act", "sqrelu")
        ratio = values.or_null("hidden_ratio", float, 4.0) or 4.0
        inner = values("intermediate_size", int, -(-int(values("hidden_size", int) * ratio) // 32) * 32)
        return [MLPConfig(hidden_dim=inner, activation="relu2", use_bias=False, token_shift=True)] * depth

    def channel_values(self, model):
        mlp = model.channel_mixer
        if not (isinstance(mlp, MLPConfig) and mlp.token_shift):
            raise Unfit("channel_mixer is no mlp with token_shift")
        return {"intermediate_size": mlp.width(model.d_model), "hidden_act": "sqrelu"}

    def linear_values(self, mixer, width):
        return {
            "head_dim": mixer.head_dim,
            "num_heads": mixer.heads(width),
            **dict(zip(RANKS, mixer.ranks(width), strict=True)),
            "fuse_norm": mixer.unit_eps == FUSED_EPS,
        }

    def values(self, model):
        return {**super().values(model), "norm_first": model.embedding_norm, "norm_bias": True}

    def table_for(self, model, names):
        one_mix = f"{self.base}{self.layers_name}.0.attn.x_x" in names
        return dataclasses.replace(self, one_mix=one_mix).table(model)

    def outside(self, model):
        yield from super().outside(model)
        if model.embedding_norm:
            for tensor, array in (("weight", "scale"), ("bias", "bias")):
                name = f"{self.base}{self.layers_name}.0.pre_norm.{tensor}"
                yield Line((name,), (Place(f"embedding_norm.{array}"),), Same())

    def layer(self, model, index, layer):
        yield from super().layer(model, index, layer)
        if index:
            yield from _low_rank("v", "to_first", layer)
            return
        mixer = model.layer_mixers[index]
        width, rank = model.d_model, mixer.ranks(model.d_model)[2]
        yield layer.line((), "mixer.to_first.down.kernel", Unused((width, rank)))
        yield layer.line((), "mixer.to_first.up.kernel", Unused((rank, width)))
        yield layer.line((), "mixer.to_first.bias", Unused((width,)), float32=True)

    def linear_lines(self, mixer, layer):
        for name in "rkvo":
            yield from layer.dense(f"attn.{name}_proj", f"mixer.{name}")
        for name in "wa":
            yield from _low_rank(name, name, layer)
        yield from _low_rank("g", "g", layer, bias=False)
        if self.one_mix:
            yield layer.same("attn.x_x", "mixer.mixes")
        else:
            for index, name in enumerate(MIXED):
                yield layer.entry(f"attn.x_{name}", "mixer.mixes", index, Widened(2, 0))
        yield layer.same("attn.k_k", "mixer.removed")
        yield layer.same("attn.k_a", "mixer.replaced")
        yield layer.line("attn.r_k", "mixer.bonus", Rows(mixer.head_dim))
        yield from layer.norm("attn.g_norm", "mixer.group_norm")

    def channel_lines(self, mlp, width, layer):
        for ours, theirs in self.mlp_names.items():
            yield from layer.dense(theirs, f"channel_mixer.{ours}")
        yield layer.same("ffn.x_k", "channel_mixer.mix")


def _low_rank(theirs: str, ours: str, layer: Layer, *, bias: bool = True) -> Iterator[Line]:
    """The lines of a projection through a narrow waist."""
    yield from layer.dense(f"attn.{theirs}_lora.lora.0", f"mixer.{ours}.down")
    yield from layer.dense(f"attn.{theirs}_lora.lora.2", f"mixer.{ours}.up")
    if bias:
        yield layer.same(f"attn.{theirs}_lora.lora.2.bias", f"mixer.{ours}.bias", float32=True)
