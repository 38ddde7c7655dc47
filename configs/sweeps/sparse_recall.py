"""How much of the context sparse attention must see to recall."""

from __future__ import annotations

import dataclasses
from typing import Any

from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.hybrid import RECALL
from plait.configs.sweeps.rows import Rows, chain, each, product, replaced

_ARMS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "softmax": ("window_size", (8, 16), {}),
    "bigbird": ("num_random_blocks", (1, 3), {"block_size": 2}),
    "dma": ("top_k", (8, 16), {}),
    "dsa": ("top_k", (8, 16), {"index_heads": 4, "index_head_dim": 32}),
    "hcam": ("top_k", (1, 3), {"block_size": 4}),
    "landmark": ("top_k", (1, 3), {"block_size": 4}),
    "moba": ("top_k", (2, 4), {"block_size": 4}),
    "nsa": ("top_k", (3, 4), {"block_size": 4, "span": 4, "stride": 4, "window_size": 4}),
    "power": ("block_size", (1, 4), {}),
    "routing": ("top_k", (8, 16), {"num_clusters": 4}),
    "sea": ("top_k", (8, 16), {"width": 16}),
}
"""Of each mixer the field that says how much is seen, its values, and others."""
_LONGER = {"landmark": 3, "sea": 16}
"""Of mixers that learn late what they choose by, the value that they train with for longer."""
_SIZES = {"dsa": {"nope_head_dim": 56, "rope_head_dim": 8, "v_head_dim": 64, "kv_rank": 64}}
"""Of mixers whose heads have not one size, 64."""
_ROWS = {"data.seq_len": 32, "data.task.vocab_size": 48, "steps": 200}
_STEPS = 1000
"""Of those that train longer."""


@SWEEPS.register("sparse_recall", source="Zoology (2312.04927); the papers of the sparse mixers")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseRecallSweep(SweepConfig):
    """Multi-query associative recall of a sparse layer at two densities, beside windows and full attention: rows of 32, 4 pairs.

    Three layers of windows of 2 stand before it, which tell each token the one before, so that what is left is to find one among the row's.
    Runs have 200 steps; landmarks and SEA, which learn late, also 1,000.

    Command: `python launch.py sweep sparse_recall --out sweeps/sparse`, then
    `python launch.py report sweeps/sparse --metric task/mqar/accuracy` draws recall against density. 75 runs.
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

        def arm(name: str, *values: Any) -> Rows:
            field, usual, others = _ARMS[name]
            return product(_last(name, **others), each(f"model.mixers.{name}.{field}", *(values or usual)))

        rows = product((told,), chain(_last("softmax"), *map(arm, _ARMS)))
        longer = product((told,), chain(*(arm(name, value) for name, value in _LONGER.items())))
        return chain(rows, replaced(longer, {"steps": _STEPS}))


def _last(name: str, **options: Any) -> Rows:
    """The mixer of the last layer, with one head of 64 and without positions."""
    mixer = f"model.mixers.{name}"
    sizes = _SIZES.get(name, {"head_dim": 64})
    own = {f"{mixer}.{key}": value for key, value in {"num_heads": 1, **sizes, "positions": None, **options}.items()}
    return ({"model.pattern": f"neighborhood*3,{name}", **own},)
