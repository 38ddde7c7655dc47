"""Fewer layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from plait.configs.domains import Counted, Line, choices
from plait.models.config import LMConfig
from plait.models.pattern import expand_pattern, pattern_of
from plait.train.convert.reshapes.base import Reshape, Subject, register
from plait.train.convert.weights import ConvertError

KEEP, DROP = "keep", "drop"


@register("depth", source="The Unreasonable Ineffectiveness of the Deeper Layers (2403.17887); ShortGPT (2403.03853)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Depth(Reshape):
    """The model without some of its layers; the others stay as they are, one after another."""

    pattern: Line = "keep*3,drop"
    """Of `keep` and `drop` over the layers, written as `model.pattern` is: "keep*3,drop", "drop@9,10; keep"."""
    keep: tuple[Counted, ...] | None = None
    """Numbers of the layers that stay, with commas, in place of a pattern."""

    def check(self) -> None:
        if self.keep == ():
            raise ValueError("keep=() must name a layer; use 0")

    def origins(self, model: LMConfig) -> Sequence[int]:
        if self.keep is not None:
            for place, index in enumerate(self.keep):
                if index >= model.num_layers:
                    raise ConvertError(
                        f"keep.{place}={index} must be below num_layers={model.num_layers}; use of 0 to {model.num_layers - 1}"
                    )
            return sorted(set(self.keep))
        words = expand_pattern(self.pattern, model.num_layers)
        for word in words:
            if word not in (KEEP, DROP):
                raise ConvertError(
                    f"pattern={self.pattern!r} has {word!r}; it must be of {choices([KEEP, DROP])}, as in 'keep*3,drop'"
                )
        kept = [index for index, word in enumerate(words) if word == KEEP]
        if not kept:
            raise ConvertError(f"pattern={self.pattern!r} drops all {model.num_layers} layers; it must keep one")
        return kept

    def model(self, subject: Subject):
        model = subject.model
        kept = self.origins(model)
        if len(kept) == model.num_layers:
            return model
        if model.shared:
            raise ConvertError(
                f"the layers read {', '.join(model.shared)}, which is of all {model.num_layers} layers together and would be another; "
                "keep all layers"
            )
        if model.layer_inputs.dim is not None:
            raise ConvertError(
                f"model.layer_inputs.dim={model.layer_inputs.dim}: inputs of each layer's own lie in one table; keep all layers"
            )
        return model.with_pattern(pattern_of([model.layers[index] for index in kept]), len(kept))
