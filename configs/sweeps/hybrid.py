"""What full layers among linear ones are for."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.rows import Rows, chain, each, product

OPTIONS: dict[str, dict[str, Any]] = {
    "hgrn": {},
    "hgrn2": {"head_dim": 16},
    "retnet": {"num_heads": 2, "expand_v": 1.0},
    "gla": {"num_heads": 2, "expand_k": 0.5},
    "deltanet": {"head_dim": 16},
    "gated_deltanet": {"head_dim": 16, "expand_v": 1.0},
}
"""The six linear mixers, with small states."""
SMALL = {
    **{name: {f"model.mixers.{name}.{key}": value for key, value in options.items()} for name, options in OPTIONS.items()},
    **{name: {f"model.mixers.{name}.num_heads": 2, f"model.mixers.{name}.head_dim": 16} for name in ("softmax", "neighborhood")},
}
RECALL = {
    "data.task": "mqar",
    "data.task.vocab_size": 128,
    "data.task.num_kv_pairs": 8,
    "data.task.val_rows": 256,
    "data.batch_size": 32,
    "steps": 600,
    "optimizer.learning_rate": 5e-3,
}


@SWEEPS.register("hybrid", source="A Systematic Analysis of Hybrid Linear Attention (2507.06457)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridSweep(SweepConfig):
    """Six linear mixers with none to all of four layers softmax: loss on text, or recall of pairs (MQAR); or what the full layer's rest does.

    Claimed: the loss hardly depends on the share of full layers, recall rises with it and saturates near three to one; RetNet and HGRN do not
    recall. Recall by state size: `report --metric task/mqar/accuracy`, whose page has that front. `--on windows` is recall with three window
    layers for each full one, of windows from 2 to 64 tokens, and of gated DeltaNet, the full layer with and without rotary positions.
    Claimed (2606.15378): larger windows delay what the full layer learns, and it is better off without positions.

    Command: `python launch.py sweep hybrid --out sweeps/hybrid` (75 runs), and with `--on recall` (75) and `--on windows` (30) into folders
    of their own.
    """

    seeds: Seeds | None = 3
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""
    on: Literal["text", "recall", "windows"] = "text"
    """What the models train on, or what is asked beside the share of full layers."""

    def rows(self) -> Rows:
        told = {"model.num_layers": 4, "probe_every": None, "checkpoint_every": None}
        if self.on == "windows":
            windows = product((pattern("neighborhood*3,softmax"),), each("model.mixers.neighborhood.window_size", 2, 8, 32, 64))
            arms = chain(windows, (pattern("gated_deltanet*3,softmax"),))
            positions = each("model.mixers.softmax.positions", "rotary", None)
            return product(({**told, **RECALL, "eval_every": 25},), arms, positions)
        trained = {"steps": 300, "eval_batches": 16} if self.on == "text" else RECALL
        ratios = ("{}", "{}*3,softmax", "{},softmax", "{},softmax*3")
        hybrids = (pattern(ratio.format(name)) for name in OPTIONS for ratio in ratios)
        return product(({**told, **trained, "eval_every": 100},), (*hybrids, pattern("softmax")))


def pattern(pattern: str) -> dict[str, Any]:
    """A row's pattern, and the small sizes of its mixers."""
    names = {group.partition("*")[0] for group in pattern.split(",")}
    return {"model.pattern": pattern, **{key: value for name in sorted(names) for key, value in SMALL[name].items()}}
