"""Softmax attention to mixers of other kinds, with what they can inherit of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from plait.configs.domains import Line, Span, choices
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.transfer import TransferConfig
from plait.models.pattern import expand_pattern
from plait.train.convert.reshapes.base import Making, Reshape, Shapes, Subject, register, with_mixers
from plait.train.convert.students import STUDENTS, Student
from plait.train.convert.weights import ConvertError

_MIXER, _TEACHER, _STUDENT = "mixer.", "mixer.inner.", "mixer.student."


@register("linearize", source="LoLCATs (2410.10254); Hedgehog (2402.04347); The Mamba in the Llama (2408.15237)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Linearize(Reshape):
    """Layers of softmax attention become others, which begin with its projections.

    With `teach` the attention stays as the teacher of the mixer that is to take its place (attention transfer): the model is what it was,
    `train --init-from` trains the students, and the reshape `students` puts them in place. Without, they are in place at once.
    """

    pattern: Line = "lolcats*3,softmax"
    """The mixer of each layer, as `model.pattern` names them: "lolcats*3,softmax". Layers that keep their own name stay."""
    teach: bool = True
    """Keep the attention beside what is to take its place, until it has learned."""
    window_size: Span = 64
    """Tokens with exact weights, where the new mixer has a window (lolcats)."""

    def model(self, subject: Subject):
        model = subject.model
        found: dict[int, MixerConfig] = {}
        for index, word in enumerate(expand_pattern(self.pattern, model.num_layers)):
            name, mixer = model.layers[index], model.layer_mixers[index]
            if word in (name, mixer.name):
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
            found[index] = self._student(word, mixer, model.d_model)
        if not found:
            raise ConvertError(
                f"pattern={self.pattern!r} changes no layer of model.pattern={model.pattern!r}; name one of {choices([*STUDENTS])}"
            )
        return with_mixers(model, found, "linear")

    def _student(self, name: str, softmax: SoftmaxConfig, d_model: int) -> MixerConfig:
        student: Any = STUDENTS[name].config(softmax, d_model)
        if hasattr(student, "window_size"):
            student = dataclasses.replace(student, window_size=self.window_size)
        return TransferConfig(mixer=student, teacher=softmax, trains=STUDENTS[name].trains) if self.teach else student

    def layer(self, old: MixerConfig, new: MixerConfig, before: Shapes, after: Shapes) -> Iterator[Making]:
        assert isinstance(old, SoftmaxConfig)
        if isinstance(new, TransferConfig):
            for path in after:
                if path.startswith(_TEACHER):
                    yield Making((_MIXER + path.removeprefix(_TEACHER),), (path,), lambda x: [x])
        student, own = (new.mixer, _STUDENT) if isinstance(new, TransferConfig) else (new, _MIXER)
        for path, shape in after.items():
            if path.startswith(own):
                source = _source(STUDENTS[student.name], path.removeprefix(own))
                yield _inherited(old.head_dim, before, _MIXER + source, path, shape) if source else Making((), (path,), None)


def _source(student: Student, path: str) -> str | None:
    """The parameter of the teacher that one of the student begins as."""
    if student.inherits is None:
        return path
    layer, _, own = path.rpartition(".")
    return f"{student.inherits[layer]}.{own}" if layer in student.inherits else None


def _inherited(head_dim: int, before: Shapes, source: str, path: str, shape: tuple[int, ...]) -> Making:
    """The teacher's parameter, its heads repeated where the student has more; a new one where the teacher has none."""
    if source not in before:
        return Making((), (path,), None)
    times = shape[-1] // before[source][-1]

    def repeated(x: np.ndarray) -> list[np.ndarray]:
        heads = x.reshape(*x.shape[:-1], -1, head_dim)
        return [np.repeat(heads, times, axis=-2).reshape(*x.shape[:-1], -1)]

    return Making((source,), (path,), (lambda x: [x]) if times == 1 else repeated)
