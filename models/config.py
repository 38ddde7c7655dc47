"""The language model's config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from plait.configs.components import Config, Table, a, at
from plait.configs.domains import Coefficient, Depth, Epsilon, Line, Positive, Vocabulary, Width
from plait.models.attention_losses import AttentionLossConfig
from plait.models.build import Norm, NormKind, SigmaReparam
from plait.models.channel_mixers.base import ChannelMixerConfig
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.dropout import DropoutConfig
from plait.models.layers.layer_inputs import LayerInputsConfig
from plait.models.layers.lora import LoRAConfig
from plait.models.mixers.base import MIXERS, Direction, MixerConfig, WrapperConfig, abstract
from plait.models.pattern import Periods, expand_pattern, find_periods, pattern_names, split_name
from plait.models.positions.base import PositionConfig
from plait.models.qk_clip import QKClipConfig
from plait.models.stream import CarryUse, check_carries

Dtype = Literal["float32", "bfloat16"]
OF_TRAINING = ("z_loss", "remat", "param_dtype", "compute_dtype", "sigma_reparam", "lora", "qk_clip", "attention_loss", "dropout")
"""Fields of a model that say nothing of the function that its weights are, or in which they can be rewritten."""


def default_mixer(name: str) -> MixerConfig:
    """The default config of a pattern name such as `gla`, `moh+softmax` or `softmax/local`. Raises ValueError if unknown."""
    wrapper, mixer = split_name(name)
    inner = MIXERS[mixer]
    if issubclass(inner, WrapperConfig):
        raise ValueError(f"{name!r} has the wrapper {mixer!r} around nothing; name a mixer after it, as in '{mixer}+softmax'")
    if wrapper is None:
        return inner()
    outer = MIXERS[wrapper]
    if not issubclass(outer, WrapperConfig):
        raise ValueError(f"{name!r} has {wrapper!r} around a mixer, and it is no wrapper; leave '{wrapper}+' out")
    return outer(mixer=inner())


def pattern_name(config: MixerConfig) -> str:
    """The name, without a label, that a pattern calls a config by: `default_mixer` read backwards."""
    return f"{config.name}+{config.mixer.name}" if isinstance(config, WrapperConfig) else config.name


def _classes(config: MixerConfig) -> str:
    """A mixer's class, and that of the one it is around."""
    name = type(config).__name__
    return f"{name} around {a(_classes(config.mixer))}" if isinstance(config, WrapperConfig) else name


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig(Config):
    """A decoder-only language model: embedding, a stack of blocks over a pattern of mixers, head."""

    path = "model"

    d_model: Width
    """Width of the residual stream."""
    num_layers: Depth
    """Number of blocks."""
    pattern: Line
    """Mixer of each layer: "gated_deltanet*3,softmax", "gla:softmax=6:1" or "softmax@0,5; gla"."""
    mixers: Mapping[str, MixerConfig] = dataclasses.field(default_factory=Table)
    """Config of each name in the pattern; names left out get their defaults."""
    channel_mixer: ChannelMixerConfig | None = GatedMLPConfig()
    """The other half of every block; None leaves it out."""
    channel_mixers: Mapping[str, ChannelMixerConfig | None] = dataclasses.field(default_factory=Table)
    """That of the layers of a name in the pattern, where it is another: a dense MLP in the first layer of a mixture of experts; or None."""
    positions: PositionConfig | None = None
    """What is added to the embedding for where a token stands (`learned`: GPT-2, OPT, BERT; `sinusoidal`); None leaves it to the mixers."""
    causal: bool = True
    """Whether a token sees those before it only (a language model that generates), or all of its document (an encoder)."""
    vocab_size: Vocabulary | None = None
    """Rows of the embedding; None gives the tokenizer's size rounded up to a multiple of 128."""
    tie_embeddings: bool = False
    """Use the embedding as the head."""
    norm: Norm = "pre"
    """`x + f(norm(x))`, `norm(x + f(x))`, `x + f(x)`, `x + norm(f(x))` (`output`, OLMo 2), `x + norm(f(norm(x)))` (`both`, Gemma 2)
    or `n + f(n)` of `n = norm(x)` (`input`, MiniMax-01)."""
    norms: Mapping[str, Norm] = dataclasses.field(default_factory=Table)
    """That of the layers of a name in the pattern, where it is another: in OLMo-hybrid `pre` around the linear layers, else `output`."""
    norm_kind: NormKind = "rms"
    """`x / rms(x) * scale`; `rms_1p`: times 1 + scale (Gemma, Qwen3-Next); `layer`: with mean and bias (GPT-2). Also the kind of softmax
    attention's norms of queries and keys."""
    norm_eps: Epsilon = 1e-6
    """Epsilon of the norms of the residual stream."""
    parallel_block: bool = False
    """Mixer and channel mixer read the same stream, `x + f(norm(x)) + g(norm'(x))`, as in GPT-NeoX; only with norm=pre."""
    embedding_norm: bool = False
    """Whether a norm stands before the first block (RWKV, BLOOM)."""
    stream_gains: bool = False
    """Each channel of the stream is multiplied by a number that is learned, at first 1, before a half of a block is added to it (Doge)."""
    layer_scalars: bool = False
    """What leaves a block, the whole stream, is multiplied by a number that is learned for each, at first 1 (Gemma 4)."""
    layer_inputs: LayerInputsConfig = LayerInputsConfig()
    embedding_scale: Positive | None = None
    """What the embedding of a token is multiplied by: sqrt(d_model) in Gemma, a number of its own in Granite."""
    stream_scale: Positive | None = None
    """What the stream is multiplied by before a half of a block is added to it: alpha of DeepNorm, and of MiniMax-01."""
    residual_scale: Positive | None = None
    """What each half of a block is multiplied by before it is added to the stream (Granite)."""
    logit_scale: Positive | None = None
    """What logits are multiplied by, before the soft cap (Cohere; Granite divides)."""
    logit_soft_cap: Positive | None = None
    """Logits become `cap * tanh(logits / cap)`."""
    z_loss: Coefficient | None = None
    """Coefficient of the mean squared log-normaliser of the output softmax."""
    sigma_reparam: SigmaReparam | None = None
    """Every projection is gain / sigma(W) W (arXiv 2303.06296); gain starts at sigma(W) ("spectral") or at 1 ("one")."""
    lora: LoRAConfig = LoRAConfig()
    qk_clip: QKClipConfig = QKClipConfig()
    attention_loss: AttentionLossConfig = AttentionLossConfig()
    dropout: DropoutConfig = DropoutConfig()
    remat: Literal["full", "dots"] | None = None
    """What the backward pass recomputes: all of a period, or all but its weight products; None keeps everything."""
    param_dtype: Dtype = "float32"
    """Dtype in which parameters are kept."""
    compute_dtype: Dtype = "float32"
    """Dtype of activations and products; states, norms, softmax statistics and the loss are float32 always."""

    def complete(self) -> None:
        names = pattern_names(self.pattern)
        extra = {name: config for name, config in self.mixers.items() if name not in names}
        try:
            table = {name: self.mixers.get(name) or default_mixer(name) for name in names}
        except ValueError as error:
            raise ValueError(f"pattern={self.pattern!r}: {error}") from None
        object.__setattr__(self, "mixers", Table({**table, **extra}))
        object.__setattr__(self, "channel_mixers", Table(self.channel_mixers))
        object.__setattr__(self, "norms", Table(self.norms))

    def check(self) -> None:
        layers = self.layers
        for name, config in self.mixers.items():
            if name not in layers:
                raise ValueError(f"mixers.{name} is in no layer of pattern={self.pattern!r}; remove it or name it in the pattern")
            if pattern_name(config) != name.partition("/")[0]:
                raise ValueError(
                    f"mixers.{name} is {a(_classes(config))}; it must be {a(_classes(default_mixer(name)))}; "
                    "change the pattern, or the config"
                )
            at(f"mixers.{name}", config.fit, self.d_model)
            for field, token in config.token_ids.items():
                if self.vocab_size is not None and token >= self.vocab_size:
                    raise ValueError(
                        f"mixers.{name}.{field}={token} must be a token of the vocabulary, of which there are "
                        f"vocab_size={self.vocab_size}; use at most {self.vocab_size - 1}"
                    )
            if self.direction not in config.directions:
                raise ValueError(
                    f"causal={self.causal} does not fit mixers.{name}, which can be {' or '.join(config.directions)} only; "
                    f"use causal={not self.causal}, or another mixer"
                )
        for name in self.norms:
            if name not in layers:
                raise ValueError(f"norms.{name} is in no layer of pattern={self.pattern!r}; remove it or name it in the pattern")
        for norm in (self.norm, *self.norms.values()):
            if self.parallel_block and norm != "pre":
                raise ValueError(f"parallel_block=True needs norm='pre', not {norm!r}; leave one of them out")
        if self.parallel_block and self.stream_scale is not None:
            raise ValueError(
                f"stream_scale={self.stream_scale} would multiply the stream of parallel_block=True twice; leave one of them out"
            )
        if self.positions is not None and self.positions.place != "input":
            raise ValueError(
                f"positions={self.positions.name!r} acts on the {self.positions.place} of attention; give it to mixers, or use 'learned' "
                "or 'sinusoidal' here"
            )
        if self.qk_clip.threshold is not None:
            self._check_clipped()
        if self.dropout.heads is not None:
            self._check_masked(self.dropout.heads)
        for name in dict.fromkeys(layers):
            one = self.channel_mixer_of(name)
            if one is not None and one.own_norm and self.norm_of(name) not in ("pre", "both"):
                raise ValueError(
                    f"norm={self.norm_of(name)!r} leaves no place for the norms that {one.name} has of its own in layers of {name}; "
                    "use 'pre' or 'both', or a channel mixer without"
                )
        if self.channel_mixer is not None:
            at("channel_mixer", self.channel_mixer.fit, self.d_model)
        for name, channel_mixer in self.channel_mixers.items():
            if name not in layers:
                raise ValueError(
                    f"channel_mixers.{name} is in no layer of pattern={self.pattern!r}; remove it or name it in the pattern"
                )
            if channel_mixer is not None:
                at(f"channel_mixers.{name}", channel_mixer.fit, self.d_model)
        check_carries([(name, self.mixers[name].carries(self.d_model)) for name in layers])

    def _check_clipped(self) -> None:
        what = f"qk_clip.threshold={self.qk_clip.threshold:g}"
        for name, value in {"sigma_reparam": self.sigma_reparam, "lora.rank": self.lora.rank}.items():
            if value is not None:
                raise ValueError(
                    f"{what} scales kernels, and with {name}={value} they do not set the logits alone; leave one of them out"
                )
        reasons = {name: mixer.unclipped for name, mixer in self.mixers.items()}
        if None not in reasons.values():
            found = "; ".join(f"mixers.{name} {reason}" for name, reason in reasons.items())
            raise ValueError(f"{what} finds no layer whose logits it could clip: {found}; leave it out")

    def _check_masked(self, heads: int) -> None:
        counts = {name: sum(abstract(mixer, self.d_model).projected) for name, mixer in self.mixers.items()}
        if all(count <= heads for count in counts.values()):
            found = ", ".join(f"mixers.{name} has {count}" for name, count in counts.items())
            raise ValueError(
                f"dropout.heads={heads} must be fewer than the heads with an output of their own of some layer, and {found}; use fewer, "
                "or leave it out"
            )

    def open_keys(self) -> Mapping[str, tuple[str, ...]]:
        return {"channel_mixers": tuple(name for name in pattern_names(self.pattern) if name not in self.channel_mixers)}

    @property
    def direction(self) -> Direction:
        """What `causal` asks of every mixer."""
        return "causal" if self.causal else "bidirectional"

    @property
    def layers(self) -> tuple[str, ...]:
        """Pattern name of each layer."""
        return expand_pattern(self.pattern, self.num_layers)

    @property
    def periods(self) -> Periods:
        """How the layers repeat. Run folders hold repeated layers as one: those of models whose layers have one channel mixer stay as they
        were before repeats were found behind other layers."""
        return find_periods(self.layers, behind_others=bool(self.channel_mixers))

    def channel_mixer_of(self, name: str) -> ChannelMixerConfig | None:
        """That of the layers of a pattern name."""
        return self.channel_mixers.get(name, self.channel_mixer)

    def norm_of(self, name: str) -> Norm:
        """That of the layers of a pattern name."""
        return self.norms.get(name, self.norm)

    @property
    def layer_channel_mixers(self) -> tuple[ChannelMixerConfig, ...]:
        """That of each layer that has one."""
        found = (self.channel_mixer_of(name) for name in self.layers)
        return tuple(one for one in found if one is not None)

    @property
    def layer_mixers(self) -> tuple[MixerConfig, ...]:
        """Mixer config of each layer."""
        return tuple(self.mixers[name] for name in self.layers)

    @property
    def shared(self) -> dict[str, CarryUse]:
        """What the model holds for layers that read it, by its name in the carry."""
        uses = (use for mixer in self.mixers.values() for use in mixer.carries(self.d_model))
        return {use.name: use for use in uses if use.use == "model"}

    @property
    def first_layers(self) -> dict[str, int]:
        """The first layer that uses each name of the carry."""
        found: dict[str, int] = {}
        for index, mixer in enumerate(self.layer_mixers):
            for use in mixer.carries(self.d_model):
                found.setdefault(use.name, index)
        return found

    def with_pattern(self, pattern: str, num_layers: int | None = None) -> LMConfig:
        """This model with another pattern (and depth): configs of names that stay are kept, new names get their defaults."""
        names = pattern_names(pattern)
        kept = lambda table: {name: config for name, config in table.items() if name in names}
        return dataclasses.replace(
            self,
            pattern=pattern,
            mixers=kept(self.mixers),
            channel_mixers=kept(self.channel_mixers),
            norms=kept(self.norms),
            num_layers=num_layers or self.num_layers,
        )

    def with_vocab(self, tokenizer_size: int) -> LMConfig:
        """This model with its vocabulary settled. Raises ValueError when it is smaller than the data's."""
        size = self.vocab_size or -(-tokenizer_size // 128) * 128
        if size < tokenizer_size:
            raise ValueError(f"model.vocab_size={size} is smaller than the data's {tokenizer_size}; leave it None or raise it")
        return dataclasses.replace(self, vocab_size=size)

    def kept(self) -> LMConfig:
        """This model as a run keeps it: with what mixers read from files written out."""
        return dataclasses.replace(
            self, mixers={name: at(f"mixers.{name}", mixer.kept, self.d_model) for name, mixer in self.mixers.items()}
        )

    @property
    def longest(self) -> dict[str, int]:
        """Tokens of the longest row that each part which has a limit can take, by its path from here."""
        limits = {f"mixers.{name}": mixer.longest for name, mixer in self.mixers.items()}
        if self.positions is not None:
            limits["positions"] = self.positions.longest
        return {name: most for name, most in limits.items() if most is not None}

    def flops(self, seq_len: int) -> float:
        """Forward operations per token at `seq_len` (2 per multiply-add, causal mean, embedding lookup free)."""
        mixers = sum(mixer.flops(self.d_model, seq_len) for mixer in self.layer_mixers)
        channel_mixers = sum(one.flops(self.d_model) for one in self.layer_channel_mixers)
        layer_inputs = self.layer_inputs.flops(self.d_model, self.num_layers)
        return mixers + channel_mixers + layer_inputs + 2.0 * self.d_model * (self.vocab_size or 0)
