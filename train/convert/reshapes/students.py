"""The students of an attention transfer into the place of their teachers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from plait.models.mixers.base import MixerConfig
from plait.models.mixers.parallel.parallel import ParallelConfig
from plait.models.mixers.transfer import TransferConfig
from plait.train.convert.reshapes.base import Making, Reshape, Shapes, Subject, chosen, register, with_mixers

_MIXER, _STUDENT = "mixer.", "student."


@register("students", source="LoLCATs (2410.10254)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Students(Reshape):
    """Layers of `transfer` become what they trained."""

    def model(self, subject: Subject):
        model = subject.model
        found = {}
        for index in chosen(model, None, lambda mixer: _student(mixer) != mixer, "a student and its teacher"):
            found[index] = _student(model.layer_mixers[index])
        return with_mixers(model, found, "linear")

    def layer(self, old: MixerConfig, new: MixerConfig, before: Shapes, after: Shapes, index: int) -> Iterator[Making]:
        parts = [(_MIXER, old)]
        if isinstance(old, ParallelConfig):
            parts = [(f"{_MIXER}parts.{i}.", part) for i, part in enumerate(old.parts)]
        for own, mixer in parts:
            for path in after:
                if path.startswith(own) and isinstance(mixer, TransferConfig):
                    yield Making((own + _STUDENT + path.removeprefix(own),), (path,), lambda x: [x])


def _student(mixer: MixerConfig) -> MixerConfig:
    """What a mixer is without teachers, those of parts beside each other too."""
    if isinstance(mixer, ParallelConfig):
        return dataclasses.replace(mixer, parts=tuple(map(_student, mixer.parts)))
    return mixer.mixer if isinstance(mixer, TransferConfig) else mixer
