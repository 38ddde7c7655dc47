"""Where the full layers of a hybrid had better be."""

from __future__ import annotations

import dataclasses

from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.rows import Rows, each, product
from plait.configs.sweeps.search import Choice, SearchConfig, Space

LAYERS = 4
TRAINING = {
    "model.num_layers": LAYERS,
    "data.task": "mqar",
    "data.task.vocab_size": 128,
    "data.task.num_kv_pairs": 8,
    "data.task.val_rows": 256,
    "data.batch_size": 32,
    "steps": 400,
    "optimizer.learning_rate": 5e-3,
    "probe_every": None,
    "eval_every": 100,
    "checkpoint_every": None,
}


@SWEEPS.register("pattern", source="no publication: hand-made ratios against a search")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PatternSweep(SweepConfig):
    """A search over the mixer of each of four layers for recall (MQAR), beside the hand-made ratios none, three to one, one to one and all.

    Nothing is claimed of it: whether a pattern that is found recalls better than those made by hand with as many full layers.

    Command: `python launch.py sweep pattern --out sweeps/pattern`. 60 runs; needs the extra `search`.
    """

    seeds: Seeds | None = 3
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""
    search: SearchConfig = SearchConfig(sampler="tpe", trials=16, metric="task/mqar/accuracy")

    def rows(self) -> Rows:
        linear = "gated_deltanet"
        patterns = (linear, f"{linear}*3,softmax", f"{linear},softmax", "softmax")
        return product((TRAINING,), each("model.pattern", *patterns))

    def space(self) -> Space:
        layer = Choice(("softmax", "gated_deltanet", "gla", "retnet"))
        return {**TRAINING, **{f"model.pattern[{place}]": layer for place in range(LAYERS)}}
