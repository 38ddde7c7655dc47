"""What a reshape is: a frozen config in one file, found by its registered name, that makes another model of a trained one."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from plait.configs.components import Component, Registry
from plait.configs.domains import choices
from plait.models.config import LMConfig, pattern_name
from plait.models.hf.transforms import Shape
from plait.models.mixers.base import MixerConfig, WrapperConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.pattern import pattern_of
from plait.train.convert.weights import ConvertError

Layers = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""Of parameters, by dotted path in the block, or outside of the blocks in the model."""


@dataclasses.dataclass(frozen=True)
class Making:
    """Parameters of the new model, and what makes them of those of the old one: paths in a block, or outside of the blocks in the model."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    make: Callable[..., Sequence[np.ndarray]] | None
    """The targets' arrays of the sources'; None for what new models begin with."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is to be reshaped, and what is known of it from its run."""

    model: LMConfig
    num_ids: int
    """Ids that its data has."""
    longest: int
    """Tokens that it was made for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reshape(Component, abc.ABC):
    """Options of a reshape. What it does not make is copied, from the parameter of the same path in the layer that the layer was, or is as
    in a new model where there was none."""

    @abc.abstractmethod
    def model(self, subject: Subject) -> LMConfig:
        """The new model. Raises ConvertError where there is none."""

    def origins(self, model: LMConfig) -> Sequence[int]:
        """The old layer that each new one was."""
        return range(model.num_layers)

    def layer(self, old: MixerConfig, new: MixerConfig, before: Shapes, after: Shapes, index: int) -> Iterator[Making]:
        """What is made in a layer, by its number in the old model, whose mixer is another now."""
        return iter(())

    def outside(self, before: Shapes, after: Shapes) -> Iterator[Making]:
        """What is made outside of the layers."""
        return iter(())

    def longest(self, tokens: int) -> int:
        """The tokens that the new model is made for, where the old one was for `tokens`."""
        return tokens


RESHAPES: Registry[Reshape] = Registry("reshape", "plait.train.convert.reshapes", Reshape)


def register(name: str, *, source: str) -> Callable[[type[Any]], type[Any]]:
    """As `Registry.register`; messages begin with the option, as it is typed."""
    return RESHAPES.register(name, source=source, path="")


def core(mixer: MixerConfig) -> MixerConfig:
    """The mixer that a wrapper is around, or itself."""
    return mixer.mixer if isinstance(mixer, WrapperConfig) else mixer


def with_core(mixer: MixerConfig, new: MixerConfig) -> MixerConfig:
    """`mixer` with another core."""
    return dataclasses.replace(mixer, mixer=new) if isinstance(mixer, WrapperConfig) else new


def core_path(mixer: MixerConfig) -> str:
    """Of a core's parameters in the block, with its dot."""
    return "mixer.inner." if isinstance(mixer, WrapperConfig) else "mixer."


def chosen(model: LMConfig, layers: Layers | None, fits: Callable[[MixerConfig], bool], what: str) -> list[int]:
    """The layers whose mixer fits, or those of them that are named.

    Args:
        what: they are, as `softmax attention`.

    Raises:
        ConvertError: none fits, or one that is named does not.
    """
    fitting = [index for index, mixer in enumerate(model.layer_mixers) if fits(mixer)]
    if not fitting:
        raise ConvertError(f"model.pattern={model.pattern!r} has no layer with {what}, which alone can be changed so")
    for place, index in enumerate(layers or ()):
        if index not in fitting:
            is_what = f"is {model.layers[index]}" if index < model.num_layers else f"is not there (num_layers={model.num_layers})"
            raise ConvertError(f"layers.{place}={index} {is_what} and must be one with {what}; use of {choices(fitting)}")
    return fitting if layers is None else sorted(set(layers))


def with_mixers(model: LMConfig, changed: Mapping[int, MixerConfig], label: str) -> LMConfig:
    """`model` with other mixers in some layers; layers of one name that are no longer alike are told apart by the label."""
    names, new = list(model.layers), dict[tuple[str, MixerConfig], str]()
    changed = {index: mixer for index, mixer in changed.items() if mixer != model.layer_mixers[index]}
    taken = {name for index, name in enumerate(names) if index not in changed}
    for index, mixer in changed.items():
        old = model.layers[index]
        if (old, mixer) not in new:
            plain, had = pattern_name(mixer), old.partition("/")[2]
            free = [f"{plain}/{had}" if had else plain, f"{plain}/{label}", *(f"{plain}/{label}_{n}" for n in range(len(names)))]
            new[old, mixer] = next(name for name in free if name not in taken)
            taken.add(new[old, mixer])
        names[index] = new[old, mixer]
    if not changed:
        return model
    mixers = {name: changed.get(index, model.layer_mixers[index]) for index, name in enumerate(names)}
    own = {name: model.channel_mixers.get(model.layers[index]) for index, name in enumerate(names)}
    channel_mixers = {name: one for name, one in own.items() if one is not None}
    return dataclasses.replace(model, pattern=pattern_of(names), mixers=mixers, channel_mixers=channel_mixers)


def is_softmax(mixer: MixerConfig) -> bool:
    """Whether a mixer is softmax attention, or around it."""
    return isinstance(core(mixer), SoftmaxConfig)


def require_plain(model: LMConfig, mixer: SoftmaxConfig, name: str, target: str, kept: Sequence[str]) -> None:
    """Raises ConvertError where softmax attention has options that `target` lacks: all but its heads and those `kept`."""
    known = {"num_heads", "num_kv_heads", "head_dim", *kept}
    for field in dataclasses.fields(mixer):
        value = getattr(mixer, field.name)
        if type(mixer) is not SoftmaxConfig or (field.name not in known and value != field.default):
            option = f".{field.name}={value!r}" if type(mixer) is SoftmaxConfig else f" is {mixer.name}"
            raise ConvertError(
                f"model.mixers.{name}{option}, which {target} has not, so that it would be another function; name other layers with layers"
            )
