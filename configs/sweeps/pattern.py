"""Where the full layers of a hybrid had better be."""

from __future__ import annotations

import dataclasses

from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.hybrid import RECALL, THETA, TIGHT, with_sizes
from plait.configs.sweeps.rows import Rows, product
from plait.configs.sweeps.search import Choice, SearchConfig, Space

LAYERS, LINEAR = 4, ("gated_deltanet", "gla", "retnet")
TRAINING = {
    **RECALL,
    "model.num_layers": LAYERS,
    "model.mixers.softmax.positions.theta": THETA,
    "probe_every": None,
    "eval_every": 100,
    "checkpoint_every": None,
}


@SWEEPS.register("pattern", source="no publication: hand-made ratios against a search")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PatternSweep(SweepConfig):
    """A search over the mixer of each of four layers for recall (MQAR), beside the hand-made ratios none, three to one, one to one and all.

    Nothing is claimed of it: whether a pattern that is found recalls better than those made by hand with as many full layers. Sizes and
    training are those of `hybrid --on recall`.

    Command: `python launch.py sweep pattern --out sweeps/pattern`. 60 runs; needs the extra `search`.
    """

    seeds: Seeds | None = 3
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""
    search: SearchConfig = SearchConfig(sampler="tpe", trials=16, metric="task/mqar/accuracy")

    def rows(self) -> Rows:
        linear = LINEAR[0]
        alone = {key: value for key, value in TRAINING.items() if not key.startswith("model.mixers.softmax.")}
        mixed = product(
            (TRAINING,), tuple(with_sizes(one, TIGHT) for one in (f"{linear}*3,softmax", f"{linear},softmax", "softmax"))
        )
        return ({**alone, **with_sizes(linear, TIGHT)}, *mixed)

    def space(self) -> Space:
        every = ("softmax", *LINEAR)
        sizes = {key: value for name in every for key, value in with_sizes(name, TIGHT).items() if key != "model.pattern"}
        return {**TRAINING, **sizes, **{f"model.pattern[{place}]": Choice(every) for place in range(LAYERS)}}
