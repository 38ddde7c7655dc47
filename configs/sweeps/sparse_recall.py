"""How much of the context sparse attention must see to recall."""

from __future__ import annotations

import dataclasses
from typing import Any

from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.rows import Rows, chain, each, product

_ARMS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "bigbird": ("num_random_blocks", (1, 4), {"block_size": 4}),
    "dma": ("top_k", (8, 32), {}),
    "hcam": ("top_k", (1, 4), {"block_size": 8}),
    "landmark": ("top_k", (1, 4), {"block_size": 8}),
    "moba": ("top_k", (2, 5), {"block_size": 8}),
    "nsa": ("top_k", (3, 6), {"block_size": 8, "span": 4, "stride": 4, "window_size": 8}),
    "power": ("block_size", (2, 8), {}),
    "routing": ("top_k", (8, 32), {"num_clusters": 8}),
    "sea": ("top_k", (8, 32), {"width": 32}),
}
"""Of each mixer the field that says how much is seen, its values, and others."""
_BESIDE = ("routing",)
"""Those that as published stand beside a window."""


@SWEEPS.register("sparse_recall", source="Zoology (2312.04927); the papers of the sparse mixers")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseRecallSweep(SweepConfig):
    """Multi-query associative recall of sparse mixers at two densities each, beside windows and full attention.

    Command: `python launch.py sweep sparse_recall --out sweeps/sparse`, then
    `python launch.py report sweeps/sparse --metric task/mqar/accuracy` draws recall against density. 63 runs.
    """

    seeds: Seeds | None = 3
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""

    def rows(self) -> Rows:
        arms = [
            product(each("model.pattern", "softmax"), _heads("softmax")),
            product(each("model.pattern", "softmax"), _heads("softmax"), each("model.mixers.softmax.window_size", 8, 32)),
        ]
        for name, (field, values, others) in _ARMS.items():
            beside = name in _BESIDE
            window = [_heads("softmax/local"), each("model.mixers.softmax/local.window_size", 8)] if beside else []
            pattern = each("model.pattern", f"softmax/local,{name}" if beside else name)
            own = [each(f"model.mixers.{name}.{key}", value) for key, value in others.items()]
            arms.append(product(pattern, *window, _heads(name), *own, each(f"model.mixers.{name}.{field}", *values)))
        return product(
            each("data.task", "mqar"),
            each("data.task.vocab_size", 256),
            each("data.task.num_kv_pairs", 8),
            each("data.seq_len", 64),
            each("data.batch_size", 64),
            each("model.d_model", 64),
            each("steps", 1500),
            each("optimizer.learning_rate", 3e-3),
            each("checkpoint_every", None),
            each("eval_every", 250),
            each("eval_batches", 8),
            each("probe_every", 250),
            chain(*arms),
        )


def _heads(name: str) -> Rows:
    """Two heads of 32."""
    return product(each(f"model.mixers.{name}.num_heads", 2), each(f"model.mixers.{name}.head_dim", 32))
