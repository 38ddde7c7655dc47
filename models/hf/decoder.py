"""What the families of Llama's making share: attention with a gated MLP after it, RMS norms before both."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from plait.models.channel_mixers.base import ChannelMixerConfig
from plait.models.channel_mixers.gated_mlp import Activation, GatedMLPConfig
from plait.models.config import LMConfig, pattern_name
from plait.models.hf.base import Family, Layer, Line, Unfit
from plait.models.hf.rope import read_rope, write_rope
from plait.models.hf.values import Values
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.pattern import pattern_of
from plait.models.positions.base import PositionConfig

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_erf",
    "relu": "relu",
    "relu2": "relu2",
}
"""Ours by the words of configs, the first of which for each is written."""


def read_activation(values: Values, key: str, default: str) -> Activation:
    """That of a field. Raises Unfit for an unknown one."""
    word = values(key, str, default)
    if word not in ACTIVATIONS:
        raise Unfit(f"config.json: {key}={word!r} is not supported; {', '.join(ACTIVATIONS)} can be used")
    return ACTIVATIONS[word]


def write_activation(activation: Activation) -> str:
    """The word for it."""
    return next(word for word, ours in ACTIVATIONS.items() if ours == activation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder(Family, abc.ABC):
    """Names and fields as in Llama; a family overrides what is its own."""

    def model(self, values: Values) -> LMConfig:
        depth, width = values("num_hidden_layers", int), values("hidden_size", int)
        layers, channel_mixers = self.layers(values, depth, width), self.channel_mixers(values, depth)
        usual, names = channel_mixers[-1], self._names(layers)
        kinds = set(zip(names, channel_mixers, strict=True))
        shared = {name for name in names if sum(name == one for one, _ in kinds) > 1}
        names = [
            _dense(name) if name in shared and own != usual else name for name, own in zip(names, channel_mixers, strict=True)
        ]
        return LMConfig(
            d_model=width,
            num_layers=depth,
            pattern=pattern_of(names),
            mixers=dict(zip(names, layers, strict=True)),
            channel_mixer=usual,
            channel_mixers={name: own for name, own in zip(names, channel_mixers, strict=True) if own != usual},
            vocab_size=values("vocab_size", int),
            tie_embeddings=values("tie_word_embeddings", bool, self.ties),
            norm_eps=values(self.eps_key, float, self.default_eps),
            **self.stream(values, width),
        )

    ties: ClassVar[bool] = False
    """Whether a config that does not say it has a tied head."""
    activation_key: ClassVar[str] = "hidden_act"
    default_activation: ClassVar[str] = "silu"
    eps_key: ClassVar[str] = "rms_norm_eps"
    default_eps: ClassVar[float] = 1e-6
    attention_names: ClassVar[Mapping[str, str]] = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    }
    """Names there by those here."""
    mlp_names: ClassVar[Mapping[str, str]] = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    """Names there by those here."""
    block: ClassVar[Mapping[str, str]] = {
        "input_layernorm.weight": "mixer_norm.scale",
        "post_attention_layernorm.weight": "channel_norm.scale",
    }
    """Norms of a layer: names there, and here."""

    def stream(self, values: Values, width: int) -> Mapping[str, Any]:
        """Options of the model around the layers."""
        return {}

    def layers(self, values: Values, depth: int, width: int) -> Sequence[MixerConfig]:
        """The mixer of each layer."""
        mixer = self.attention(values, width)
        own = lambda window: {"window_size": window, "positions": self.positions(values, window)}
        return [dataclasses.replace(mixer, **own(window)) for window in self.windows(values, depth)]

    def positions(self, values: Values, window: int | None) -> PositionConfig | None:
        """Of the layers with a window, or of those without."""
        return read_rope(values, max_len=values("max_position_embeddings", int, 2048))

    def attention(self, values: Values, width: int) -> SoftmaxConfig:
        """What the layers have in common."""
        heads = values("num_attention_heads", int)
        head_dim = values("head_dim", int, width // heads)
        bias = values("attention_bias", bool, False)
        return SoftmaxConfig(
            num_heads=heads,
            num_kv_heads=values("num_key_value_heads", int, heads),
            head_dim=head_dim,
            qkv_bias=bias,
            o_bias=bias,
        )

    def windows(self, values: Values, depth: int) -> list[int | None]:
        """Of each layer; none by default."""
        values.only("sliding_window")
        values.passed_over(("layer_types",))
        return [None] * depth

    def channel_mixers(self, values: Values, depth: int) -> Sequence[ChannelMixerConfig]:
        """That of each layer: two kinds at most."""
        return [self.channel_mixer(values)] * depth

    def channel_mixer(self, values: Values) -> GatedMLPConfig:
        """The gated MLP of layers that have one."""
        return GatedMLPConfig(
            hidden_dim=values("intermediate_size", int),
            activation=read_activation(values, self.activation_key, self.default_activation),
            use_bias=values("mlp_bias", bool, False),
        )

    def values(self, model: LMConfig) -> dict[str, Any]:
        return {
            "vocab_size": model.vocab_size,
            "hidden_size": model.d_model,
            "num_hidden_layers": model.num_layers,
            self.eps_key: model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            **self.channel_values(model),
            **self.mixer_values(model),
        }

    def mixer_values(self, model: LMConfig) -> Mapping[str, Any]:
        """The fields of the mixers, and those of this family alone. Raises Unfit where the family has no such ones."""
        mixers = self.softmax_layers(model)
        heads, kv_heads = mixers[0].heads(model.d_model)
        return {
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": mixers[0].head_dim,
            "rope_parameters": self.rope(mixers),
            **self.own_values(model, mixers),
        }

    def channel_values(self, model: LMConfig) -> Mapping[str, Any]:
        """The fields of the channel mixers. Raises Unfit where the family has no such ones."""
        mlp = model.channel_mixer
        if not isinstance(mlp, GatedMLPConfig):
            raise Unfit(f"channel_mixer={getattr(mlp, 'name', None)!r} is no gated MLP")
        return {
            "intermediate_size": mlp.width(model.d_model),
            self.activation_key: write_activation(mlp.activation),
            **({"mlp_bias": True} if mlp.use_bias else {}),
        }

    def own_values(self, model: LMConfig, mixers: Sequence[SoftmaxConfig]) -> Mapping[str, Any]:
        """The fields of this family alone."""
        return {"attention_bias": mixers[0].qkv_bias}

    def rope(self, mixers: Sequence[SoftmaxConfig]) -> Mapping[str, Any]:
        """`rope_parameters`: those of the layers that have positions."""
        return write_rope(next((mixer.positions for mixer in mixers if mixer.positions is not None), None))

    def softmax_layers(self, model: LMConfig) -> list[SoftmaxConfig]:
        """The mixers of the layers that are softmax attention. Raises Unfit where one is that may not be another."""
        mixers = []
        for name, mixer in zip(model.layers, model.layer_mixers, strict=True):
            if type(mixer) is not SoftmaxConfig:
                raise Unfit(f"mixers.{name} is {mixer.name}, not softmax")
            mixers.append(mixer)
        return mixers

    def layer(self, model: LMConfig, index: int, layer: Layer) -> Iterator[Line]:
        mixer, channel_mixer = model.layer_mixers[index], model.channel_mixer_of(model.layers[index])
        yield from self.mixer_lines(mixer, model.d_model, layer)
        yield from self.channel_lines(channel_mixer, model.d_model, layer)
        for theirs, ours in self.norms(mixer).items():
            yield layer.same(theirs, ours)

    def norms(self, mixer: MixerConfig) -> Mapping[str, str]:
        """`block`, of a layer with such a mixer."""
        return self.block

    def mixer_lines(self, mixer: MixerConfig, width: int, layer: Layer) -> Iterator[Line]:
        """Those of a layer's mixer."""
        assert isinstance(mixer, SoftmaxConfig)
        yield from self.query_lines(mixer, width, layer)
        reads = mixer.shared_kv == "read"
        for name in "" if reads else "k" if mixer.tie_kv else "kv":
            yield from layer.dense(self.attention_names[name], f"mixer.{name}", bias=mixer.qkv_bias)
        yield from layer.dense(self.attention_names["o"], "mixer.o", bias=mixer.o_bias)
        if mixer.qk_norm:
            for name in ("q_norm",) if reads else ("q_norm", "k_norm"):
                yield layer.same(f"{self.attention_names[name]}.weight", f"mixer.{name}.scale")
        if mixer.sink_logits:
            yield layer.same("self_attn.sinks", "mixer.sinks")

    def query_lines(self, mixer: SoftmaxConfig, width: int, layer: Layer) -> Iterator[Line]:
        """Those of the projection to queries."""
        yield from layer.dense(self.attention_names["q"], "mixer.q", bias=mixer.qkv_bias)

    def channel_lines(self, mlp: ChannelMixerConfig | None, width: int, layer: Layer) -> Iterator[Line]:
        """Those of a layer's channel mixer."""
        assert isinstance(mlp, GatedMLPConfig)
        for ours, theirs in self.mlp_names.items():
            yield from layer.dense(theirs, f"channel_mixer.{ours}", bias=mlp.use_bias)

    @staticmethod
    def _names(layers: Sequence[MixerConfig]) -> list[str]:
        """Pattern names of layers: of their mixers, or where these are several of a name, by their windows or positions."""
        kinds = list(dict.fromkeys(layers))
        plain = [pattern_name(kind) for kind in kinds]
        labels = {kind: name if plain.count(name) == 1 else _label(kind) for kind, name in zip(kinds, plain, strict=True)}
        if len(set(labels.values())) < len(kinds):
            labels = {kind: f"{name}/{number}" for number, (kind, name) in enumerate(zip(kinds, plain, strict=True), 1)}
        return [labels[layer] for layer in layers]


def _dense(name: str) -> str:
    """The pattern name of a layer with a dense MLP where others have experts."""
    return f"{name}_dense" if "/" in name else f"{name}/dense"


def _label(mixer: MixerConfig) -> str:
    """A pattern name that says what tells the softmax layers of one model apart."""
    assert isinstance(mixer, SoftmaxConfig)
    kind = "window" if mixer.window_size is not None else "nope" if mixer.positions is None else None
    label = "_".join(word for word in (kind, mixer.shared_kv) if word is not None)
    return f"softmax/{label}" if label else "softmax"
