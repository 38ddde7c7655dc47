"""Gemma 3, text: Gemma 2 without soft caps, with norms of queries and keys, and other rotary embeddings in layers with a window."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import register
from plait.models.hf.gemma2 import Gemma2
from plait.models.hf.rope import read_rope, write_rope
from plait.models.hf.windows import FULL, WINDOW, read_windows
from plait.models.positions.rotary import RotaryConfig


@register("gemma3_text", source="Gemma 3 (2503.19786)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Text(Gemma2):
    """See `Decoder`. Older files give the base of the layers with a window as `rope_local_base_freq`."""

    architecture = "Gemma3ForCausalLM"
    logit_cap = None
    attention_cap = None

    def attention(self, values, width):
        eps = values("rms_norm_eps", float, 1e-6)
        return dataclasses.replace(super().attention(values, width), qk_norm=True, qk_norm_eps=eps)

    def windows(self, values, depth):
        every = values("sliding_window_pattern", int, values("_sliding_window_pattern", int, 6))
        default = [FULL if (index + 1) % every == 0 else WINDOW for index in range(depth)]
        return read_windows(values, depth, default, values.or_null("sliding_window", int, 4096))

    def positions(self, values, window):
        local = values("rope_local_base_freq", float, None)
        if window is not None and local is not None:
            return RotaryConfig(theta=local)
        return read_rope(values, max_len=values("max_position_embeddings", int, 131_072), key=FULL if window is None else WINDOW)

    def rope(self, mixers):
        return {WINDOW if mixer.window_size else FULL: write_rope(mixer.positions) for mixer in mixers}
