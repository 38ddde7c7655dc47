"""Full attention to sparse, and back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from flax import nnx

from plait.configs.domains import Line, SomeSpan, Span, choices
from plait.models.mixers.base import MIXERS, MixerConfig, abstract
from plait.models.mixers.full.dot_product import GroupedConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.sparse.moa import MoAConfig
from plait.models.mixers.sparse.selecting import Blocks
from plait.models.pattern import expand_pattern
from plait.train.convert.reshapes.base import Reshape, Subject, core, register, require_plain, with_core, with_mixers
from plait.train.convert.weights import ConvertError

_SEEN = ("window_size", "num_sink_tokens")
"""What softmax attention sees, by its options."""


@register("sparse", source="MoBA (2502.13189), section 3.2; S^2-Attn of LongLoRA (2309.12307); MoA (2406.14909)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse(Reshape):
    """Layers of full attention choose what they see, or see some by a rule, or all again. No parameter changes.

    For sparse mixers with the parameters of softmax attention and no others: a layer keeps its heads, key heads and positions, and what
    other options of softmax attention the mixer has too.
    """

    pattern: Line = "moba"
    """The mixer of each layer, as `model.pattern` names them: "moba*3,softmax". Layers that have it already stay, but for options."""
    block_size: Span | None = None
    """Tokens of a block, of mixers that have it, as what follows; None gives what each has by default."""
    top_k: Blocks | None = None
    """Blocks that a query sees."""
    window_size: Span | None = None
    """Tokens of a window."""
    num_sink_tokens: SomeSpan | None = None
    """Leading tokens of each document that stay visible."""
    plan: Line | None = None
    """Rules of the heads for `moa`, a JSON file: a layer of the model gets those of the plan's layer of its number."""

    def model(self, subject: Subject):
        model, found = subject.model, dict[int, MixerConfig]()
        for index, word in enumerate(expand_pattern(self.pattern, model.num_layers)):
            name, mixer = model.layers[index], model.layer_mixers[index]
            if word not in (name, core(mixer).name) or self._options(word):
                found[index] = with_core(mixer, self._made(subject, index, word))
        for option, value in self._given.items():
            if not any(option in self._options(core(mixer).name) for mixer in found.values()):
                raise ConvertError(f"{option}={value} is of no mixer that pattern={self.pattern!r} puts in place; leave it out")
        new = with_mixers(model, found, "sparse")
        if new == model:
            raise ConvertError(
                f"pattern={self.pattern!r} changes no layer of model.pattern={model.pattern!r}; name one of {choices([*kinds()])}"
            )
        return new

    @property
    def _given(self) -> dict[str, Any]:
        """Options of mixers that are set."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "pattern"}
        return {name: value for name, value in options.items() if value is not None}

    def _options(self, word: str) -> dict[str, Any]:
        """Those that a mixer has; full attention has none."""
        own = {field.name for field in dataclasses.fields(kinds()[word])} if word in kinds() and word != "softmax" else set()
        return {name: value for name, value in self._given.items() if name in own}

    def _made(self, subject: Subject, index: int, word: str) -> MixerConfig:
        model = subject.model
        name, old = model.layers[index], core(model.layer_mixers[index])
        what = f"pattern={self.pattern!r} gives layer {index} {word!r}"
        if word not in kinds():
            raise ConvertError(f"{what}; it must be {name!r}, which is there, or one of {choices([*kinds()])}")
        if old.name not in kinds():
            raise ConvertError(f"{what}, and it is {old.name}, which has other parameters; leave it {name!r}")
        kept = _common(old, kinds()[word])
        require_plain(model, SoftmaxConfig(**_common(old, SoftmaxConfig)), name, word, [*kept])
        options = self._options(word)
        if kinds()[word] is MoAConfig:
            options |= {"length": subject.longest, **({} if self.plan is None else {"layer": index})}
        return kinds()[word](**kept, **options).kept(model.d_model)


@functools.cache
def kinds() -> Mapping[str, type[Any]]:
    """Softmax attention and the sparse mixers that have its parameters, by name."""
    found: dict[str, type[Any]] = {"softmax": SoftmaxConfig}
    for name, kind in MIXERS.all().items():
        if kind.kind == "sparse" and issubclass(kind, GroupedConfig | SoftmaxConfig):
            example = kind.example()
            if _shapes(example) == _shapes(SoftmaxConfig(**_common(example, SoftmaxConfig))):
                found[name] = kind
    return found


def _common(mixer: MixerConfig, kind: type[MixerConfig]) -> dict[str, Any]:
    """Options of softmax attention that a mixer and a kind have both, but for what they see."""
    names = [{field.name for field in dataclasses.fields(one)} - {*_SEEN} for one in (mixer, kind, SoftmaxConfig)]
    return {name: getattr(mixer, name) for name in sorted(set.intersection(*names))}


def _shapes(mixer: MixerConfig) -> dict[Any, Any]:
    """Of a module's variables, by path."""
    return {path: value.shape for path, value in nnx.to_flat_state(nnx.state(abstract(mixer, 64)))}
