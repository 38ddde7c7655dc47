"""Granite with windows in three of four layers, a base of the rotary embedding for each layer, and a sink logit for each head."""

from __future__ import annotations

import dataclasses
from typing import Any

from plait.models.hf.base import Unfit, register
from plait.models.hf.granite import Granite
from plait.models.hf.windows import FULL, WINDOW, read_windows, write_windows


@register("granite_swa", source="Granite with sliding windows (IBM, 2026)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteSWA(Granite):
    """See `Decoder`. A base of 0 is no rotary embedding."""

    architecture = "GraniteSWAForCausalLM"
    ties = True

    def attention(self, values, width):
        return dataclasses.replace(super().attention(values, width), sink_logits=True)

    def windows(self, values, depth):
        default = [WINDOW if index % 4 else FULL for index in range(depth)]
        return read_windows(values, depth, default, values.or_null("sliding_window", int, 128))

    def layers(self, values, depth, width):
        layers: Any = super().layers(values, depth, width)
        bases = values("layer_rope_theta", list, [layer.positions.theta for layer in layers])
        if len(bases) != depth:
            raise Unfit(f"config.json: layer_rope_theta has {len(bases)} entries and num_hidden_layers={depth}; give one a layer")
        turned = lambda layer, base: dataclasses.replace(layer.positions, theta=float(base)) if base else None
        return [dataclasses.replace(layer, positions=turned(layer, base)) for layer, base in zip(layers, bases, strict=True)]

    def own_values(self, model, mixers):
        return {
            **super().own_values(model, mixers),
            **write_windows([mixer.window_size for mixer in mixers]),
            "layer_rope_theta": [0 if mixer.positions is None else mixer.positions.theta for mixer in mixers],
        }
