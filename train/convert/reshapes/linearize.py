"""Softmax attention to mixers of other kinds, with what they can inherit of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from plait.configs.domains import Line, Span, choices
from plait.models.config import LMConfig
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.parallel.parallel import ParallelConfig
from plait.models.mixers.transfer import TransferConfig
from plait.models.pattern import expand_pattern
from plait.train.convert.linearize.head_parts import HeadPart, head_parts
from plait.train.convert.linearize.students import STUDENTS, Student
from plait.train.convert.reshapes.base import Making, Reshape, Shapes, Subject, register, with_mixers
from plait.train.convert.weights import ConvertError
from plait.train.inspection.heads import named_heads

_MIXER, _TEACHER, _STUDENT = "mixer.", "inner.", "student."


@register(
    "linearize", source="LoLCATs (2410.10254); Hedgehog (2402.04347); The Mamba in the Llama (2408.15237); HydraHead (2606.20097)"
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Linearize(Reshape):
    """Layers of softmax attention become others, which begin with its projections.

    With `teach` the attention stays as the teacher of the mixer that is to take its place (attention transfer): the model is what it was,
    `train --init-from` trains the students, and the reshape `students` puts them in place. Without, they are in place at once.
    """

    pattern: Line = "lolcats*3,softmax"
    """The mixer of each layer, as `model.pattern` names them: "lolcats*3,softmax". Layers that keep their own name stay."""
    heads: Line | None = None
    """Heads that stay softmax in layers that become others, as LAYER.HEAD from 0: "3.1,12.0"; beside them the new mixer has the rest."""
    teach: bool = True
    """Keep the attention beside what is to take its place, until it has learned."""
    window_size: Span = 64
    """Tokens with exact weights, where the new mixer has a window (lolcats)."""

    def model(self, subject: Subject):
        model = subject.model
        heads = self._heads(model)
        found: dict[int, MixerConfig] = {}
        for index, word in enumerate(expand_pattern(self.pattern, model.num_layers)):
            name, mixer = model.layers[index], model.layer_mixers[index]
            if word in (name, mixer.name):
                if index in heads:
                    raise ConvertError(
                        f"heads={self.heads!r} names heads of layer {index}, which pattern={self.pattern!r} leaves {name!r}; leave them out"
                    )
                continue
            if word not in STUDENTS:
                raise ConvertError(
                    f"pattern={self.pattern!r} gives layer {index} {word!r}; it must be {name!r}, which is there, or one of "
                    f"{choices([*STUDENTS])}"
                )
            if type(mixer) is not SoftmaxConfig:
                raise ConvertError(
                    f"pattern={self.pattern!r} gives layer {index} {word!r}, and it is {mixer.name}; leave it {name!r}"
                )
            if index in heads:
                found[index] = self._beside(index, word, mixer, heads[index], model.d_model)
            else:
                found[index] = self._student(word, mixer, model.d_model)
        if not found:
            raise ConvertError(
                f"pattern={self.pattern!r} changes no layer of model.pattern={model.pattern!r}; name one of {choices([*STUDENTS])}"
            )
        return with_mixers(model, found, "linear")

    def _heads(self, model: LMConfig) -> dict[int, list[int]]:
        """Those that stay, by layer."""
        found: dict[int, list[int]] = {}
        for layer, head in named_heads("heads", self.heads, model) if self.heads is not None else ():
            found.setdefault(layer, []).append(head)
        return found

    def _student(self, name: str, softmax: SoftmaxConfig, d_model: int) -> MixerConfig:
        student: Any = STUDENTS[name].config(softmax, d_model)
        if hasattr(student, "window_size"):
            student = dataclasses.replace(student, window_size=self.window_size)
        return TransferConfig(mixer=student, teacher=softmax, trains=STUDENTS[name].trains) if self.teach else student

    def _beside(self, index: int, name: str, softmax: SoftmaxConfig, heads: list[int], d_model: int) -> MixerConfig:
        """Heads that stay, and a student of the others."""
        try:
            kept, others = head_parts(softmax, d_model, heads)
        except ValueError as error:
            raise ConvertError(f"heads={self.heads!r}: layer {index} {error}") from None
        parts = kept.config(first=True), self._student(name, others.config(first=False), d_model)
        return ParallelConfig(parts=parts, join="sum", norm=None)

    def layer(self, old: MixerConfig, new: MixerConfig, before: Shapes, after: Shapes, index: int) -> Iterator[Making]:
        assert isinstance(old, SoftmaxConfig)
        d_model = before[f"{_MIXER}q.kernel"][0]
        every = HeadPart(old, d_model, tuple(range(old.heads(d_model)[0])))
        parts = [(_MIXER, new, every)]
        if isinstance(new, ParallelConfig):
            assert self.heads is not None
            named = (word.strip().split(".") for word in self.heads.split(",") if word.strip())
            both = head_parts(old, d_model, {int(head) for layer, head in named if int(layer) == index})
            parts = [(f"{_MIXER}parts.{i}.", one, part) for i, (one, part) in enumerate(zip(new.parts, both, strict=True))]
        for own, mixer, part in parts:
            for path, shape in after.items():
                if path.startswith(own):
                    yield _inherited(part, before, _source(mixer, path.removeprefix(own)), path, shape)


def _source(mixer: MixerConfig, path: str) -> str | None:
    """The parameter of softmax attention that one of a mixer in its place begins as: of heads that stay, of a teacher, of a student."""
    if type(mixer) is SoftmaxConfig:
        return path
    if not isinstance(mixer, TransferConfig):
        return _of_teacher(STUDENTS[mixer.name], path)
    if path.startswith(_TEACHER):
        return path.removeprefix(_TEACHER)
    return _of_teacher(STUDENTS[mixer.mixer.name], path.removeprefix(_STUDENT))


def _of_teacher(student: Student, path: str) -> str | None:
    """The parameter of the teacher that one of the student begins as."""
    if student.inherits is None:
        return path
    layer, _, own = path.rpartition(".")
    return f"{student.inherits[layer]}.{own}" if layer in student.inherits else None


def _inherited(part: HeadPart, before: Shapes, source: str | None, path: str, shape: tuple[int, ...]) -> Making:
    """What heads have of the teacher's parameter, repeated where the student has more heads; a new one where the teacher has none."""
    if source is None or _MIXER + source not in before:
        return Making((), (path,), None)
    times = shape[-1] // part.shape(source, before[_MIXER + source])[-1]

    def repeated(x: np.ndarray) -> list[np.ndarray]:
        x = part.cut(source, x)
        heads = x.reshape(*x.shape[:-1], -1, part.softmax.head_dim)
        return [x if times == 1 else np.repeat(heads, times, axis=-2).reshape(*x.shape[:-1], -1)]

    return Making((_MIXER + source,), (path,), repeated)
