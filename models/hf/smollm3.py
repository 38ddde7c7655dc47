"""SmolLM 3: Llama in which every fourth layer has no positions."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import Unfit, register
from plait.models.hf.decoder import Decoder
from plait.models.hf.windows import FULL, read_windows, write_windows


@register("smollm3", source="SmolLM3: smol, multilingual, long-context reasoner (Hugging Face, 2025)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolLM3(Decoder):
    """See `Decoder`."""

    architecture = "SmolLM3ForCausalLM"
    ties = True

    def layers(self, values, depth, width):
        every = values("no_rope_layer_interval", int, 4)
        turned = values("no_rope_layers", list, [int((index + 1) % every != 0) for index in range(depth)])
        if len(turned) != depth:
            raise Unfit(f"config.json: no_rope_layers has {len(turned)} entries and num_hidden_layers={depth}; give one a layer")
        layers = super().layers(values, depth, width)
        still = lambda layer: dataclasses.replace(layer, positions=None)
        return [layer if turns else still(layer) for layer, turns in zip(layers, turned, strict=True)]

    def windows(self, values, depth):
        used = values("use_sliding_window", bool, False)
        window = values("sliding_window", int, None) if used else None
        values.passed_over(("sliding_window", "max_window_layers"))
        return read_windows(values, depth, [FULL] * depth, window)

    def values(self, model):
        turned = [mixer.positions is not None for mixer in self.softmax_layers(model)]
        if not any(turned):
            raise Unfit("no layer has positions")
        return {**super().values(model), "no_rope_layers": [int(turns) for turns in turned]}

    def own_values(self, model, mixers):
        windows = write_windows([mixer.window_size for mixer in mixers])
        return {**super().own_values(model, mixers), **windows, "use_sliding_window": windows["sliding_window"] is not None}
