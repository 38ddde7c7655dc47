"""What full layers among linear ones are for."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.rows import Rows, chain, product

OPTIONS: dict[str, dict[str, Any]] = {
    "hgrn": {},
    "hgrn2": {"head_dim": 16},
    "retnet": {"num_heads": 2, "expand_v": 1.0},
    "gla": {"num_heads": 2, "expand_k": 0.5},
    "deltanet": {"head_dim": 16},
    "gated_deltanet": {"head_dim": 16, "expand_v": 1.0},
}
"""The six linear mixers, with small states."""


@SWEEPS.register("hybrid", source="A Systematic Analysis of Hybrid Linear Attention (2507.06457)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridSweep(SweepConfig):
    """Six linear mixers alone, three to one and one to one with softmax layers, and softmax alone: loss on text, or recall of pairs (MQAR).

    Claimed: the loss hardly depends on the share of full layers, recall rises with it and saturates near three to one; RetNet and HGRN do not
    recall. Recall by state size: `report --metric task/mqar/accuracy`, whose page has that front.

    Command: `python launch.py sweep hybrid --out sweeps/hybrid`, and with `--on recall`, into another folder. 57 runs each.
    """

    seeds: Seeds | None = 3
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""
    on: Literal["text", "recall"] = "text"
    """What the models train on."""

    def rows(self) -> Rows:
        hybrids = [
            {"model.pattern": pattern, **{f"model.mixers.{name}.{key}": value for key, value in options.items()}}
            for name, options in OPTIONS.items()
            for pattern in (name, f"{name}*3,softmax", f"{name},softmax")
        ]
        softmax = {"model.mixers.softmax.num_heads": 2, "model.mixers.softmax.head_dim": 16}
        recall = {
            "data.task": "mqar",
            "data.task.vocab_size": 128,
            "data.task.num_kv_pairs": 8,
            "data.task.val_rows": 256,
            "data.batch_size": 32,
            "steps": 600,
            "optimizer.learning_rate": 5e-3,
        }
        told = {"probe_every": None, "eval_every": 100, "checkpoint_every": None}
        on = recall if self.on == "recall" else {"steps": 300, "eval_batches": 16}
        patterns = tuple({**row, **(softmax if "softmax" in str(row["model.pattern"]) else {})} for row in hybrids)
        both = chain(patterns, ({"model.pattern": "softmax", **softmax},))
        return product(({"model.num_layers": 4, **on, **told},), both)
