"""The students of an attention transfer into the place of their teachers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from plait.models.mixers.base import MixerConfig
from plait.models.mixers.transfer import TransferConfig
from plait.train.convert.reshapes.base import Making, Reshape, Shapes, Subject, chosen, register, with_mixers

_MIXER, _STUDENT = "mixer.", "mixer.student."


@register("students", source="LoLCATs (2410.10254)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Students(Reshape):
    """Layers of `transfer` become what they trained."""

    def model(self, subject: Subject):
        model = subject.model
        found = {}
        for index in chosen(model, None, lambda mixer: isinstance(mixer, TransferConfig), "a student and its teacher"):
            mixer = model.layer_mixers[index]
            assert isinstance(mixer, TransferConfig)
            found[index] = mixer.mixer
        return with_mixers(model, found, "linear")

    def layer(self, old: MixerConfig, new: MixerConfig, before: Shapes, after: Shapes) -> Iterator[Making]:
        for path in after:
            if path.startswith(_MIXER):
                yield Making((_STUDENT + path.removeprefix(_MIXER),), (path,), lambda x: [x])
