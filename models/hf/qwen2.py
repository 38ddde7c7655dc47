"""Qwen 2 and 2.5: Llama with biases of queries, keys and values, and windows in its later layers where it has any."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import register
from plait.models.hf.decoder import Decoder
from plait.models.hf.windows import FULL, WINDOW, read_windows, write_windows


@register("qwen2", source="Qwen2 Technical Report (2407.10671)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2(Decoder):
    """See `Decoder`."""

    architecture = "Qwen2ForCausalLM"

    def attention(self, values, width):
        return dataclasses.replace(super().attention(values, width), qkv_bias=True)

    def windows(self, values, depth):
        window = values.or_null("sliding_window", int, 4096)
        used = values("use_sliding_window", bool, False)
        first = values("max_window_layers", int, 28)
        default = [WINDOW if used and index >= first else FULL for index in range(depth)]
        return read_windows(values, depth, default, window)

    def own_values(self, model, mixers):
        windows = write_windows([mixer.window_size for mixer in mixers])
        return {**windows, "use_sliding_window": windows["sliding_window"] is not None}
