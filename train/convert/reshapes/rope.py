"""Rotary embedding for longer documents."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from plait.configs.domains import Counted, Length, Number
from plait.models.mixers.base import MixerConfig
from plait.models.positions.rotary import RotaryConfig
from plait.models.positions.rotary_linear import LinearRotaryConfig
from plait.models.positions.rotary_ntk import NTKRotaryConfig
from plait.models.positions.rotary_yarn import YarnRotaryConfig
from plait.train.convert.reshapes.base import Reshape, Subject, chosen, core, register, with_core, with_mixers


@register("rope", source="Positional Interpolation (2306.15595); NTK-aware scaling and YaRN (2309.00071)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope(Reshape):
    """Plain rotary embedding stretched by a factor, in all layers that have it and no window. No parameter changes."""

    method: Literal["linear", "ntk", "yarn"] = "yarn"
    """`linear` presses all positions together (PI), `ntk` raises the base, `yarn` presses slow pairs together and sharpens attention."""
    factor: Annotated[float, Number(least=1, most=2**10)] = 4.0
    """Longest document over the one of training."""
    original_len: Length | None = None
    """Tokens of the longest document of training, of which `yarn` counts the turns; None gives that of the published config, or else the
    run's rows."""
    layers: tuple[Counted, ...] | None = None
    """Numbers of the layers, with commas; by default all with plain rotary embedding and no window."""

    def model(self, subject: Subject):
        model = subject.model
        plain = lambda mixer: type(getattr(core(mixer), "positions", None)) is RotaryConfig
        fits = (
            plain if self.layers is not None else lambda mixer: plain(mixer) and getattr(core(mixer), "window_size", None) is None
        )
        what = "plain rotary embedding" + (" and no window" if self.layers is None else "")
        found = {index: self._longer(model.layer_mixers[index], subject) for index in chosen(model, self.layers, fits, what)}
        return with_mixers(model, found, "long")

    def _longer(self, mixer: MixerConfig, subject: Subject) -> MixerConfig:
        inner: Any = core(mixer)
        common = {field.name: getattr(inner.positions, field.name) for field in dataclasses.fields(RotaryConfig)}
        common["factor"] = self.factor
        if self.method == "linear":
            longer: RotaryConfig = LinearRotaryConfig(**common)
        elif self.method == "ntk":
            longer = NTKRotaryConfig(**common)
        else:
            longer = YarnRotaryConfig(**common, original_len=self.original_len or subject.longest)
        return with_core(mixer, dataclasses.replace(inner, positions=longer))

    def longest(self, tokens: int) -> int:
        return round(tokens * self.factor)
