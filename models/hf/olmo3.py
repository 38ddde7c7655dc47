"""OLMo 3: OLMo 2 with a window in three of four layers, which have rotary embeddings of their own."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import register
from plait.models.hf.olmo2 import OLMo2
from plait.models.hf.rope import read_rope, write_rope
from plait.models.hf.windows import FULL, WINDOW, read_windows, write_windows


@register("olmo3", source="OLMo 3 (Ai2, 2025)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class OLMo3(OLMo2):
    """See `Decoder`."""

    architecture = "Olmo3ForCausalLM"

    def positions(self, values, window):
        max_len = values("max_position_embeddings", int, 2048)
        return read_rope(values, max_len=max_len, key=FULL if window is None else WINDOW)

    def windows(self, values, depth):
        default = [FULL if (index + 1) % 4 == 0 else WINDOW for index in range(depth)]
        return read_windows(values, depth, default, values.or_null("sliding_window", int, 4096))

    def rope(self, mixers):
        return {WINDOW if mixer.window_size else FULL: write_rope(mixer.positions) for mixer in mixers}

    def own_values(self, model, mixers):
        return {**super().own_values(model, mixers), **write_windows([mixer.window_size for mixer in mixers])}
