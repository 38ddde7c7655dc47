"""How much of the context sparse attention must see to recall."""

from __future__ import annotations

import dataclasses
from typing import Any

from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.hybrid import RECALL
from plait.configs.sweeps.rows import Rows, chain, each, product

_ARMS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "softmax": ("window_size", (8, 16), {}),
    "bigbird": ("num_random_blocks", (1, 3), {"block_size": 2}),
    "dma": ("top_k", (8, 16), {}),
    "hcam": ("top_k", (1, 3), {"block_size": 4}),
    "landmark": ("top_k", (1, 3), {"block_size": 4}),
    "moba": ("top_k", (2, 4), {"block_size": 4}),
    "nsa": ("top_k", (3, 4), {"block_size": 4, "span": 4, "stride": 4, "window_size": 4}),
    "power": ("block_size", (1, 4), {}),
    "routing": ("top_k", (8, 16), {"num_clusters": 4}),
    "sea": ("top_k", (8, 16), {"width": 16}),
}
"""Of each mixer the field that says how much is seen, its values, and others."""
_ROWS = {"data.seq_len": 32, "data.task.vocab_size": 48, "steps": 200}


@SWEEPS.register("sparse_recall", source="Zoology (2312.04927); the papers of the sparse mixers")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseRecallSweep(SweepConfig):
    """Multi-query associative recall of a sparse layer at two densities, beside windows and full attention: rows of 32, 4 pairs.

    Three layers of windows of 2 stand before it, which tell each token the one before, so that what is left is to find one among the row's.

    Command: `python launch.py sweep sparse_recall --out sweeps/sparse`, then
    `python launch.py report sweeps/sparse --metric task/mqar/accuracy` draws recall against density. 63 runs.
    """

    seeds: Seeds | None = 3
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""

    def rows(self) -> Rows:
        windows = "model.mixers.neighborhood"
        told = {
            **RECALL,
            **_ROWS,
            "model.num_layers": 4,
            f"{windows}.num_heads": 1,
            f"{windows}.head_dim": 64,
            f"{windows}.window_size": 2,
            "probe_every": 50,
            "eval_every": 25,
            "checkpoint_every": None,
        }
        arms = [
            product(_last(name, **others), each(f"model.mixers.{name}.{field}", *values))
            for name, (field, values, others) in _ARMS.items()
        ]
        return product((told,), chain(_last("softmax"), *arms))


def _last(name: str, **options: Any) -> Rows:
    """The mixer of the last layer, with one head of 64 and without positions."""
    mixer = f"model.mixers.{name}"
    own = {f"{mixer}.{key}": value for key, value in {"num_heads": 1, "head_dim": 64, "positions": None, **options}.items()}
    return ({"model.pattern": f"neighborhood*3,{name}", **own},)
