"""What full layers among linear ones are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.rows import Rows, chain, each, product

SMALL: dict[str, dict[str, Any]] = {
    "hgrn": {},
    "hgrn2": {"head_dim": 16},
    "retnet": {"num_heads": 2, "expand_v": 1.0},
    "gla": {"num_heads": 2, "expand_k": 0.5},
    "deltanet": {"head_dim": 16},
    "gated_deltanet": {"head_dim": 16, "expand_v": 1.0},
    "softmax": {"num_heads": 2, "head_dim": 16},
}
"""Options of the six linear mixers and of the full layer at a width of 32."""
TIGHT: dict[str, dict[str, Any]] = {
    "hgrn": {},
    "hgrn2": {"head_dim": 4},
    "retnet": {"num_heads": 16, "expand_v": 1.0},
    "gla": {"num_heads": 8, "expand_k": 0.5},
    "deltanet": {"head_dim": 4},
    "gated_deltanet": {"head_dim": 4, "expand_v": 1.0},
    "softmax": {"num_heads": 1, "head_dim": 64},
    "neighborhood": {"num_heads": 1, "head_dim": 64},
}
"""Those at a width of 64, with states of 256 numbers a layer (HGRN's 64), and short convolutions where a mixer has them."""
RECALL = {
    "model.d_model": 64,
    "data.task": "mqar",
    "data.task.vocab_size": 32,
    "data.task.num_kv_pairs": 4,
    "data.task.val_rows": 512,
    "data.seq_len": 16,
    "data.batch_size": 128,
    "steps": 600,
    "optimizer": "muon",
    "optimizer.learning_rate": 5e-3,
    "optimizer.warmup_steps": 50,
    "optimizer.schedule": "wsd",
}
THETA = 100.0
"""Base of rotary positions: in rows of 16 tokens the usual base turns most channels by nothing, and a head finds the token before later."""
LINEAR = tuple(name for name in SMALL if name != "softmax")


@SWEEPS.register("hybrid", source="A Systematic Analysis of Hybrid Linear Attention (2507.06457)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridSweep(SweepConfig):
    """Six linear mixers with none to all of four layers softmax: loss on text, or recall of pairs (MQAR); or what the full layer's rest does.

    Claimed: the loss hardly depends on the share of full layers, recall rises with it and saturates near three to one; RetNet and HGRN do not
    recall. Recall by state size: `report --metric task/mqar/accuracy`, whose page has that front. `--on windows` is recall with three window
    layers for each full one, of windows from 2 to 16 tokens, and of gated DeltaNet, the full layer with and without rotary positions.
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
        turned = {} if self.on == "text" else {"model.mixers.softmax.positions.theta": THETA}
        if self.on == "windows":
            windows = product(
                (with_sizes("neighborhood*3,softmax", TIGHT),), each("model.mixers.neighborhood.window_size", 2, 4, 8, 16)
            )
            arms = chain(windows, (with_sizes("gated_deltanet*3,softmax", TIGHT),))
            positions = chain((turned,), each("model.mixers.softmax.positions", None))
            return product(({**told, **RECALL, "eval_every": 25},), arms, positions)
        trained, sizes = ({"steps": 300, "eval_batches": 16}, SMALL) if self.on == "text" else (RECALL, TIGHT)
        ratios = ("{}", "{}*3,softmax", "{},softmax", "{},softmax*3")
        patterns = (*(ratio.format(name) for name in LINEAR for ratio in ratios), "softmax")
        models = tuple({**with_sizes(one, sizes), **(turned if "softmax" in one else {})} for one in patterns)
        return product(({**told, **trained, "eval_every": 100},), models)


def with_sizes(pattern: str, sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A pattern, and the options of its mixers as `sizes` has them."""
    names = sorted({group.partition("*")[0] for group in pattern.split(",")})
    options = {f"model.mixers.{name}.{key}": value for name in names for key, value in sizes[name].items()}
    return {"model.pattern": pattern, **options}
