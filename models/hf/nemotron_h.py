"""Nemotron-H: Mamba-2, attention without positions and MLPs or experts, one a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from types import MappingProxyType as Fixed
from typing import Any, NamedTuple

from plait.models.channel_mixers.base import ChannelMixerConfig
from plait.models.channel_mixers.mlp import MLPConfig
from plait.models.channel_mixers.moe import MoEConfig
from plait.models.config import LMConfig
from plait.models.hf.base import Layer, Unfit, register
from plait.models.hf.decoder import Decoder, read_activation, write_activation
from plait.models.hf.experts import OF_TRAINING, Key
from plait.models.hf.ssm import first_of, mamba2_lines, read_mamba2, write_mamba2
from plait.models.hf.values import Values
from plait.models.hf.windows import FULL, LINEAR, OLDER
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.mamba2 import Mamba2Config
from plait.models.pattern import pattern_of

MLP, MOE = "mlp", "moe"
LETTERS = Fixed({"M": LINEAR, "*": FULL, "-": MLP, "E": MOE})
"""Of older files, which have a line of letters in place of a list."""
KEYS = Fixed(
    {
        "num_heads": "mamba_num_heads",
        "head_dim": "mamba_head_dim",
        "state_dim": "ssm_state_size",
        "num_groups": "n_groups",
        "conv_size": "conv_kernel",
        "conv_bias": "use_conv_bias",
        "use_bias": "use_bias",
        "expand": "expand",
        "chunk_size": "chunk_size",
    }
)
PARTS = ("up", "down")
MOE_KEYS = Fixed(
    {
        "num_experts": Key("n_routed_experts", 8),
        "top_k": Key("num_experts_per_tok", 2),
        "hidden_dim": Key("moe_intermediate_size", 7688),
        "shared_hidden_dim": Key("moe_shared_expert_intermediate_size", 7688),
        "routed_scale": Key("routed_scaling_factor", 1.0),
        "normalize": Key("norm_topk_prob", True),
        "num_groups": Key("n_group", 1),
        "top_k_groups": Key("topk_group", 1),
    }
)
MOE_OPTIONS: Mapping[str, Any] = Fixed({"gated": False, "scores": "sigmoid", "num_shared_experts": 1, "balance_bias": 0.001})


class Pair(NamedTuple):
    """The layers there that are one block here."""

    mixer: str
    channels: str | None


def _pairs(words: list[str]) -> list[Pair]:
    """The blocks. Raises Unfit where a layer that mixes channels has none before it that mixes tokens."""
    found: list[Pair] = []
    for index, word in enumerate(words):
        if word in (LINEAR, FULL):
            found.append(Pair(word, None))
        elif found and found[-1].channels is None:
            found[-1] = Pair(found[-1].mixer, word)
        else:
            raise Unfit(f"config.json: layer {index} is {word!r} and the one before it neither {LINEAR} nor {FULL}")
    return found


@register("nemotron_h", source="Nemotron-H (2504.03624)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NemotronH(Decoder):
    """A layer that mixes tokens and one that mixes channels after it are one block here. Time steps have no limit, as in the published code;
    transformers 5.24 raises them to `time_step_min` where it reads more than one token (its pull request 48989)."""

    architecture = "NemotronHForCausalLM"
    mixers = ("mamba2", "softmax")
    base = "backbone."
    around = Fixed({"embeddings.weight": "embedding", "norm_f.weight": "norm.scale"})
    eps_key, default_eps = "layer_norm_epsilon", 1e-5
    activation_key, default_activation = "mlp_hidden_act", "relu2"
    attention_names = Fixed({name: f"mixer.{name}_proj" for name in "qkvo"})
    ignored = ("mtp.*",)
    stale = ("hybrid_override_pattern", "layer_types", "attention_head_dim")

    def model(self, values):
        width = values("hidden_size", int)
        pairs = _pairs(_words(values))
        attention, mamba = self.attention(values, width), self.mamba(values, width)
        mixers = {FULL: attention, LINEAR: mamba}
        words = {pair.channels for pair in pairs if pair.channels is not None}
        channels: dict[str | None, ChannelMixerConfig | None] = {None: None, **self.kinds(values, words)}
        usual = max(channels, key=lambda kind: sum(pair.channels == kind for pair in pairs))
        label = lambda pair: "" if pair.channels == usual else f"/{pair.channels or 'alone'}"
        names = [mixers[pair.mixer].name + label(pair) for pair in pairs]
        table = dict(zip(names, pairs, strict=True))
        return LMConfig(
            d_model=width,
            num_layers=len(pairs),
            pattern=pattern_of(names),
            mixers={name: mixers[pair.mixer] for name, pair in table.items()},
            channel_mixer=channels[usual],
            channel_mixers={name: channels[pair.channels] for name, pair in table.items() if pair.channels != usual},
            vocab_size=values("vocab_size", int),
            tie_embeddings=values("tie_word_embeddings", bool, False),
            norm_eps=values(self.eps_key, float, self.default_eps),
        )

    def attention(self, values, width):
        values.only("sliding_window")
        values.only("attention_bias", False)
        values.passed_over(("rope_theta", "rope_scaling", "partial_rotary_factor"))  # no part of a head is turned
        head_dim = values("head_dim", int, values("attention_head_dim", int, 128))
        return dataclasses.replace(super().attention(values, width), head_dim=head_dim, positions=None)

    def mamba(self, values: Values, width: int) -> Mamba2Config:
        """The mixer of the layers that are no attention."""
        values.passed_over(
            ("expand", "time_step_rank", "mamba_ssm_cache_dtype", "num_logits_to_keep", "rms_norm_eps", "norm_eps")
        )
        values.only("mamba_hidden_act", "silu")
        values.only("mamba_proj_bias", values("use_bias", bool, False))
        inner = values(KEYS["num_heads"], int, 128) * values(KEYS["head_dim"], int, 64)
        return read_mamba2(values, width, KEYS, inner=inner, norm_eps=values(self.eps_key, float, self.default_eps))

    def kinds(self, values: Values, words: Set[str]) -> dict[str | None, ChannelMixerConfig]:
        """The channel mixers that layers have, by their words."""
        activation = read_activation(values, self.activation_key, self.default_activation)
        options: Any = {"activation": activation, "use_bias": values("mlp_bias", bool, False)}
        values.passed_over((*OF_TRAINING, "num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern"))
        values.passed_over(
            ("n_shared_experts", "moe_shared_expert_overlap")
        )  # transformers always builds one, of the width that is given
        dim, experts = values("intermediate_size", int, 21504), {ours: key.read(values) for ours, key in MOE_KEYS.items()}
        latent = values("moe_latent_size", int, None)
        found: dict[str | None, ChannelMixerConfig] = {MLP: MLPConfig(hidden_dim=dim, **options)} if MLP in words else {}
        if MOE in words:
            values.only("mlp_bias", False)  # of routed experts there are none
            found[MOE] = MoEConfig(**experts, **MOE_OPTIONS, latent_dim=latent, **options)
        return found

    def values(self, model):
        width = model.d_model
        attention, mamba = first_of(model, SoftmaxConfig), first_of(model, Mamba2Config)
        heads, kv_heads = attention.heads(width)
        words: list[str] = []
        kinds: dict[str, Any] = {}
        for name, mixer in zip(model.layers, model.layer_mixers, strict=True):
            words.append(FULL if isinstance(mixer, SoftmaxConfig) else LINEAR)
            if (channels := model.channel_mixer_of(name)) is not None:
                words.append(MOE if isinstance(channels, MoEConfig) else MLP)
                kinds[words[-1]] = channels
        mlp, experts = kinds.get(MLP), kinds.get(MOE)
        either = mlp or experts
        return {
            "vocab_size": model.vocab_size,
            "hidden_size": width,
            "num_hidden_layers": len(words),
            "layers_block_type": words,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": attention.head_dim,
            self.eps_key: model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            **write_mamba2(mamba, width, KEYS),
            **({"mlp_bias": either.use_bias, self.activation_key: write_activation(either.activation)} if either else {}),
            **({"intermediate_size": mlp.width(width)} if mlp else {}),
            **(self._expert_values(experts, width) if experts else {}),
        }

    def _expert_values(self, experts: MoEConfig, width: int) -> dict[str, Any]:
        settled = experts.settled(width)
        return {**{key.name: getattr(settled, ours) for ours, key in MOE_KEYS.items()}, "moe_latent_size": experts.latent_dim}

    def layer(self, model, index, layer):
        number = sum(1 + (model.channel_mixer_of(name) is not None) for name in model.layers[:index])
        mixing, after = (Layer(layer.place, f"{self.base}{self.layers_name}.{i}.") for i in (number, number + 1))
        mixer, channels = model.layer_mixers[index], model.channel_mixer_of(model.layers[index])
        yield mixing.same("norm.weight", "mixer_norm.scale")
        if isinstance(mixer, Mamba2Config):
            yield from mamba2_lines(mixing, "mixer", mixer, model.d_model)
        else:
            yield from self.mixer_lines(mixer, model.d_model, mixing)
        if channels is not None:
            yield after.same("norm.weight", "channel_norm.scale")
            yield from self.channel_lines(channels, model.d_model, after)

    def channel_lines(self, mlp, width, layer):
        bias = mlp.use_bias
        if isinstance(mlp, MLPConfig):
            for part in PARTS:
                yield from layer.dense(f"mixer.{part}_proj", f"channel_mixer.{part}", bias=bias)
            return
        yield from layer.dense("mixer.gate", "channel_mixer.router")
        yield layer.same("mixer.gate.e_score_correction_bias", "channel_mixer.bias", float32=True)
        for part in PARTS:
            for number in range(mlp.num_experts):
                yield layer.expert(f"mixer.experts.{number}.{part}_proj", f"channel_mixer.{part}", number)
            yield from layer.dense(f"mixer.shared_experts.{part}_proj", f"channel_mixer.shared.{part}", bias=bias)
        if mlp.latent_dim is not None:
            for number, part in enumerate(("latent_in", "latent_out")):
                yield from layer.dense(f"mixer.fc{number + 1}_latent_proj", f"channel_mixer.{part}", bias=bias)


def _words(values: Values) -> list[str]:
    """What each layer is. Raises Unfit for an unknown word."""
    line = values("hybrid_override_pattern", str, None)
    default = None if line is None else [LETTERS.get(letter, letter) for letter in line]
    given = values("layers_block_type", list, values("layer_types", list, default))
    words = [OLDER.get(word, word) for word in given or ()]
    values.passed_over(("num_hidden_layers",))  # that of the list is taken
    if not words or (unknown := {*words} - {*LETTERS.values()}):
        raise Unfit(
            f"config.json: layers_block_type has {sorted(unknown)[0]!r}; {', '.join(LETTERS.values())} can be used"
            if words
            else "config.json: layers_block_type is missing; add it, as the file of a published model has it"
        )
    return words
