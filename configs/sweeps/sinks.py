"""Which attention has sinks, and with what training."""

from __future__ import annotations

import dataclasses
from typing import Literal

from plait.configs.domains import Name
from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.rows import Rows, chain, each, product

SOFTMAX, RELU = "model.mixers.softmax", "model.mixers.relu_attention"


@SWEEPS.register("sinks", source="When Attention Sink Emerges in Language Models (2410.10781)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SinksSweep(SweepConfig):
    """The sink of `lm_sinks` by kind of attention and weight decay; or by learning rate, data, length, packing, depth, norm and positions.

    Claimed: sigmoid attention, keys of a bias, gates and windows take the sink from the first token; it needs many different rows and a large
    learning rate, comes with any positions, and weight decay helps it up to a point.

    Command: `python launch.py sweep sinks --out sweeps/sinks --workers 2`, 27 runs, and with `--on training`, into another folder, 48 runs.
    """

    preset: Name = "lm_sinks"
    """What the overrides of a row are of."""
    seeds: Seeds | None = 3
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""
    on: Literal["attention", "training"] = "attention"
    """What is varied."""

    def rows(self) -> Rows:
        if self.on == "training":
            return chain(
                ({},),
                each("optimizer.learning_rate", 1e-3, 1e-2),
                each("data.task.train_rows", 64, 640),
                each("data.seq_len", 32, 128),
                ({"data.seq_len": 128, "data.task.num_sequences": 2, "data.batch_size": 8},),
                each("model.num_layers", 2, 4),
                product(each("model.parallel_block", False), each("model.norm", "pre", "post")),
                each(f"{SOFTMAX}.positions", None, "learned", "alibi", "rotary"),
            )
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
