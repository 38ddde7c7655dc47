"""What the formats of flash-linear-attention share: a linear mixer, softmax attention in the layers that `attn` names, gated MLPs."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType as Fixed
from typing import Any, ClassVar

from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.config import LMConfig
from plait.models.hf.base import Layer, Line, Unfit
from plait.models.hf.decoder import Decoder
from plait.models.hf.rope import write_rope
from plait.models.hf.transforms import Taps
from plait.models.hf.values import Values
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.positions.rotary import RotaryConfig

OF_KERNELS = ("attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp")
"""Fields of kernels and losses. Whether a norm is fused changes its name at most; both are read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FLA(Decoder, abc.ABC):
    """Loaded by `transformers` where `fla` is imported."""

    around = Fixed({"embeddings.weight": "embedding", "norm.weight": "norm.scale"})
    block = Fixed({"attn_norm.weight": "mixer_norm.scale", "mlp_norm.weight": "channel_norm.scale"})
    attention_names = Fixed({name: f"attn.{name}_proj" for name in "qkvo"})
    eps_key = "norm_eps"
    ignored = ("model.layers.*.attn.rotary.inv_freq",)
    mixer_type: ClassVar[type[MixerConfig]]
    """Of the linear layers."""
    hidden_ratio: ClassVar[int] = 4
    """Parameters of an MLP over the square of the width, where a config says neither."""
    convolved: ClassVar[Sequence[str]] = ()
    """Projections with a short convolution after them, where the layers have any."""

    @abc.abstractmethod
    def linear(self, values: Values, width: int) -> MixerConfig:
        """The mixer of the linear layers."""

    @abc.abstractmethod
    def linear_values(self, mixer: Any, width: int) -> Mapping[str, Any]:
        """Its fields."""

    @abc.abstractmethod
    def linear_lines(self, mixer: Any, layer: Layer) -> Iterator[Line]:
        """Those of a linear layer's mixer, but for convolutions."""

    def layers(self, values, depth, width):
        values.passed_over(OF_KERNELS)
        values.only("attnres_block_size")
        values.only("elementwise_affine", True)
        linear = self.linear(values, width)
        specs = values("attn", (dict, list), [])
        softmax: dict[int, MixerConfig] = {}
        for spec in specs if isinstance(specs, list) else [specs]:
            fields = Values(spec)
            softmax |= dict.fromkeys(fields("layers", list), _attention(fields, width))
            fields.finish()
        if not set(softmax) < set(range(depth)):
            raise Unfit(f"config.json: attn names layers {sorted(softmax)} of {depth}; it must leave some of them to {self.name}")
        return [softmax.get(index, linear) for index in range(depth)]

    def channel_mixer(self, values):
        values.only("hidden_act", "swish")
        width, ratio = values("hidden_size", int), values.or_null("hidden_ratio", float, self.hidden_ratio) or 4
        inner = values("intermediate_size", int, -(-int(width * ratio * 2 / 3) // 256) * 256)
        return GatedMLPConfig(hidden_dim=inner)

    def channel_values(self, model):
        return {**super().channel_values(model), "hidden_act": "swish"}

    def values(self, model):
        linear = {name: mixer for name, mixer in model.mixers.items() if not isinstance(mixer, SoftmaxConfig)}
        for name, mixer in linear.items():
            if type(mixer) is not self.mixer_type:
                raise Unfit(f"mixers.{name} is {mixer.name}, neither softmax nor {self.mixer_type.name}")
        if not linear:
            raise Unfit(f"no layer is {self.mixer_type.name}")
        return {
            "vocab_size": model.vocab_size,
            "hidden_size": model.d_model,
            "num_hidden_layers": model.num_layers,
            "norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            "fuse_norm": True,
            **self.channel_values(model),
            **self.linear_values(next(iter(linear.values())), model.d_model),
            "attn": _specs(model),
        }

    def mixer_lines(self, mixer, width, layer):
        if isinstance(mixer, SoftmaxConfig):
            yield from super().mixer_lines(mixer, width, layer)
            return
        yield from self.linear_lines(mixer, layer)
        if getattr(mixer, "conv_size", None) is not None:
            for name in self.convolved:
                yield layer.line(f"attn.{name}_conv1d.weight", f"mixer.{name}_conv.weight", Taps())


def _attention(fields: Values, width: int) -> SoftmaxConfig:
    heads = fields("num_heads", int)
    return SoftmaxConfig(
        num_heads=heads,
        num_kv_heads=fields("num_kv_heads", int, heads),
        head_dim=width // heads,
        qkv_bias=fields("qkv_bias", bool, False),
        window_size=fields("window_size", int, None),
        positions=RotaryConfig(theta=fields("rope_theta", float, 10_000.0)),
    )


def _specs(model: LMConfig) -> dict[str, Any] | list[dict[str, Any]] | None:
    """`attn`: the layers of each kind of softmax attention."""
    specs = []
    for name, mixer in model.mixers.items():
        if isinstance(mixer, SoftmaxConfig):
            heads, kv_heads = mixer.heads(model.d_model)
            specs.append(
                {
                    "layers": [index for index, own in enumerate(model.layers) if own == name],
                    "num_heads": heads,
                    "num_kv_heads": kv_heads,
                    "qkv_bias": mixer.qkv_bias,
                    "window_size": mixer.window_size,
                    "rope_theta": write_rope(mixer.positions)["rope_theta"],
                }
            )
    return None if not specs else specs[0] if len(specs) == 1 else specs
