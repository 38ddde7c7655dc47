"""Which attention has sinks."""

from __future__ import annotations

import dataclasses

from plait.configs.domains import Name
from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.rows import Rows, chain, each

SOFTMAX, RELU = "model.mixers.softmax", "model.mixers.relu_attention"


@SWEEPS.register("sinks", source="When Attention Sink Emerges in Language Models (2410.10781)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SinksSweep(SweepConfig):
    """The sink of `lm_sinks` beside sigmoid and ReLU attention, output gates, a learned key, a window, and other weight decay.

    Command: `python launch.py sweep sinks --out sweeps/sinks --workers 2`. 27 runs.
    """

    preset: Name = "lm_sinks"
    """What the overrides of a row are of."""
    seeds: Seeds | None = 3
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""

    def rows(self) -> Rows:
        relu = {"model.pattern": "relu_attention", f"{RELU}.num_heads": 1, f"{RELU}.positions": "sinusoidal"}
        return chain(
            ({},),
            each(f"{SOFTMAX}.normalizer", "sigmoid"),
            (relu,),
            each(f"{SOFTMAX}.gate", "headwise", "elementwise"),
            each(f"{SOFTMAX}.sink_bias", "kv"),
            each(f"{SOFTMAX}.window_size", 16),
            each("optimizer.weight_decay", 0.0, 0.5),
        )
